"""A sequence whose entries are read on access."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeVar, overload

Entry = TypeVar("Entry")


class StoredSequence(Sequence[Entry]):
    """Implements indexing, slicing and iteration; a subclass implements `read` and `__len__`."""

    @abstractmethod
    def read(self, number: int) -> Entry:
        """The entry with this number, from 0 to the length - 1."""

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...
    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        numbers = range(len(self))[index]
        return self.read(numbers) if isinstance(numbers, int) else [self.read(number) for number in numbers]

    def __iter__(self) -> Iterator[Entry]:
        return map(self.read, range(len(self)))
