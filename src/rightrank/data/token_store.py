"""Encoded examples in flat memory-mapped files, so that the process holds only a few bytes per example.

Token ids and labels are int32, one example after the other, in unnamed files that the system removes with the process. The
system reads the pages that a batch needs and evicts them when memory is short.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rightrank.data.forms import StoredSequence

BUFFERED_VALUES = 2**16  # collected before a write


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """Token ids of one example [n], with its labels [n], or its class for classification.

    A preference pair holds two sequences, the chosen one and the rejected one, end to end.
    """

    item_id: str
    input_ids: Sequence[int]
    labels: Sequence[int]  # n labels, aligned with input_ids (not shifted); or [class]
    first_length: int = 0  # tokens of the first sequence of two; 0: the example is one sequence

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return (self.first_length, self.length - self.first_length) if self.first_length else (self.length,)

    def sequences(self) -> list[tuple[Sequence[int], Sequence[int]]]:
        """`(token ids, labels)` of each sequence."""
        if not self.first_length:
            return [(self.input_ids, self.labels)]
        ids, labels, first = self.input_ids, self.labels, self.first_length
        return [(ids[:first], labels[:first]), (ids[first:], labels[first:])]


class TokenStore(StoredSequence[EncodedExample]):
    """A sequence of encoded examples, written once and read one by one."""

    def __init__(self, examples: Iterable[EncodedExample], folder: Path | None) -> None:
        """Write `examples` to files in `folder`; None for the system's folder for temporary files."""
        self._ids = _FlatFile("u1", folder)
        self._tokens = _FlatFile("i4", folder)
        self._labels = _FlatFile("i4", folder)
        self._first_lengths = array("i")
        self.longest_sequence = 0  # in tokens
        try:
            for example in examples:
                self._ids.append(example.item_id.encode())
                self._tokens.append(example.input_ids)
                self._labels.append(example.labels)
                self._first_lengths.append(example.first_length)
                self.longest_sequence = max(self.longest_sequence, *example.sequence_lengths)
        finally:
            for file in (self._ids, self._tokens, self._labels):
                file.close()

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[examples], in tokens."""
        return np.diff(np.asarray(self._tokens.ends))

    def __len__(self) -> int:
        return len(self._tokens.ends) - 1

    def read(self, number: int) -> EncodedExample:
        name = bytes(self._ids.read(number)).decode()
        tokens, labels = self._tokens.read(number).tolist(), self._labels.read(number).tolist()
        return EncodedExample(name, tokens, labels, self._first_lengths[number])


def lengths_of(examples: Sequence[EncodedExample]) -> npt.NDArray[np.int64]:
    """[examples], in tokens."""
    if isinstance(examples, TokenStore):
        return examples.lengths
    return np.fromiter((example.length for example in examples), np.int64, len(examples))


def longest_sequence(examples: Sequence[EncodedExample]) -> int:
    """Tokens of the longest sequence of any example."""
    if isinstance(examples, TokenStore):
        return examples.longest_sequence
    return max(length for example in examples for length in example.sequence_lengths)


class _FlatFile:
    """Rows of numbers of one type, end to end."""

    def __init__(self, dtype: str, folder: Path | None) -> None:
        self.ends = array("q", [0])
        self._dtype = np.dtype(dtype)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed in `close`
        self._waiting: list[npt.NDArray[Any]] = []
        self._waiting_values = 0
        self._values: npt.NDArray[Any] = np.empty(0, self._dtype)

    def append(self, row: Sequence[int] | bytes) -> None:
        values = np.frombuffer(row, self._dtype) if isinstance(row, bytes) else np.asarray(row, self._dtype)
        self.ends.append(self.ends[-1] + len(values))
        self._waiting.append(values)
        self._waiting_values += len(values)
        if self._waiting_values >= BUFFERED_VALUES:
            self._write()

    def close(self) -> None:
        """Map the written rows into memory; no more can be added."""
        self._write()
        with self._file as file:  # a mapping outlives its file
            file.flush()
            if self.ends[-1]:
                self._values = np.memmap(file, self._dtype, "r")

    def read(self, number: int) -> npt.NDArray[Any]:
        return self._values[self.ends[number] : self.ends[number + 1]]

    def _write(self) -> None:
        if self._waiting:
            self._file.write(np.concatenate(self._waiting).tobytes())
        self._waiting, self._waiting_values = [], 0
