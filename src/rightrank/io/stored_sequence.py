"""A sequence whose items are made anew, one by one, whenever they are asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeVar, overload

Entry = TypeVar("Entry")


class StoredSequence(Sequence[Entry]):
    """Indices, slices and iteration over what `read` gives."""

    @abstractmethod
    def read(self, number: int) -> Entry:
        """The item of this number, which is from 0 and below the length."""

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...
    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        numbers = range(len(self))[index]
        return self.read(numbers) if isinstance(numbers, int) else [self.read(number) for number in numbers]

    def __iter__(self) -> Iterator[Entry]:
        return map(self.read, range(len(self)))
