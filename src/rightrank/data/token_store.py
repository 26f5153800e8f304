"""Store entries, such as the tokens of examples, in Arrow files, so that the process keeps only a few bytes of each in memory.

The files have no name, and the operating system removes them with the process. It reads the pages that a batch needs and evicts
them when memory is short.
"""

from __future__ import annotations

import mmap
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.compute

IGNORED = -100  # the label without loss in torch and transformers
ROWS = 256  # collected before a write
Entry = TypeVar("Entry")


class Store(Sequence[Entry]):
    """Entries as rows of an Arrow file that is written once. A subclass defines the columns of an entry."""

    schema: ClassVar[Any]

    def __init__(self, entries: Iterable[Entry], folder: Path | None) -> None:
        """Write `entries` to a file in `folder`, or in the system's folder for temporary files if it is None."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        rows = map(self.row, entries)
        with tempfile.TemporaryFile(dir=folder) as file:
            with pyarrow.ipc.new_file(file, self.schema) as writer:
                while batch := list(islice(rows, ROWS)):
                    writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, self.schema))
            file.flush()
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # outlives the file
        self._reader: Any = pyarrow.ipc.open_file(pyarrow.py_buffer(self._mapped))
        self._rows: int = sum(batch.num_rows for batch in self.batches())
        self._release_pages()

    @abstractmethod
    def row(self, entry: Entry) -> Mapping[str, Any]:
        """Convert an entry to the columns of a row."""

    @abstractmethod
    def entry(self, row: Mapping[str, Any]) -> Entry:
        """Convert the columns of a row to an entry."""

    def batches(self) -> Iterator[Any]:
        """Yield the rows in batches of `ROWS`. Batches are not cached, because each takes several kilobytes in addition to its rows."""
        return map(self._reader.get_batch, range(self._reader.num_record_batches))

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[Entry]:
        for batch in self.batches():
            yield from map(self.entry, batch.to_pylist())
            self._release_pages()

    def _release_pages(self) -> None:
        """Release the file's pages from the process's memory. The system reads them again when they are needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def __getitem__(self, index: Any) -> Any:
        """Return the entry at a number, or the list of those in a slice."""
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return [self[number] for number in numbers]
        batch, position = divmod(numbers, ROWS)
        return self.entry(self._reader.get_batch(batch).slice(position, 1).to_pylist()[0])


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """The token ids of an example [n] with its labels [n], or with its class for classification.

    A preference pair is stored as two sequences, first the chosen one and then the rejected one.
    """

    example_id: str
    input_ids: Sequence[int]
    labels: Sequence[int]  # n labels, aligned with input_ids (not shifted); or [class]
    first_length: int = 0  # tokens of the first sequence of two; 0: the example is one sequence

    @property
    def length(self) -> int:
        return len(self.input_ids)

    def sequences(self) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Return `(token ids, labels)` of each sequence."""
        if not self.first_length:
            return [(self.input_ids, self.labels)]
        ids, labels, first = self.input_ids, self.labels, self.first_length
        return [(ids[:first], labels[:first]), (ids[first:], labels[first:])]


class TokenStore(Store[EncodedExample]):
    schema = pyarrow.schema(
        {
            "example_id": pyarrow.string(),
            "input_ids": pyarrow.list_(pyarrow.int32()),
            "labels": pyarrow.list_(pyarrow.int32()),
            "first_length": pyarrow.int32(),
        }
    )

    def row(self, entry: EncodedExample) -> Mapping[str, Any]:
        ids, labels = (np.asarray(values, np.int32) for values in (entry.input_ids, entry.labels))
        return {"example_id": entry.example_id, "input_ids": ids, "labels": labels, "first_length": entry.first_length}

    def entry(self, row: Mapping[str, Any]) -> EncodedExample:
        return EncodedExample(**row)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each example [examples]."""
        return self._read_column(lambda batch: pyarrow.compute.list_value_length(batch["input_ids"]))

    @property
    def longest_sequences(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens in the longest sequence of each example [examples]."""
        firsts = self._read_column(lambda batch: batch["first_length"])
        return np.asarray(np.maximum(firsts, self.lengths - firsts), np.int64)

    def _read_column(self, column: Callable[[Any], Any]) -> npt.NDArray[np.int64]:
        """Return one integer for each example [examples]."""
        numbers = np.empty(len(self), np.int64)
        for number, batch in enumerate(self.batches()):
            numbers[number * ROWS :][: batch.num_rows] = column(batch).to_numpy()
        self._release_pages()
        return numbers
