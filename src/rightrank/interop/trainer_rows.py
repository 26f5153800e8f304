"""Read a trainer's rows without changing the training: copies of its data set and collator, groups and duplicates of rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import IterableDataset, Subset

from rightrank.adapters.batch_scores import Batch, positions
from rightrank.adapters.preserved_state import copy_reader
from rightrank.data.splits import sample_indices
from rightrank.data.token_store import IGNORED
from rightrank.schema.errors import DataError, first_line
from rightrank.train.covariances import MOMENT_TOKENS

MIN_EXAMPLES = 30
MOMENT_BATCHES = 64  # of a loop of the user's own
MOMENT_SHARE = 0.02  # of the training's tokens, for second moments
# Columns that say nothing of what an example is: what follows from its tokens, what is asked of it, and numbers of rows.
NOT_CONTENT = re.compile(r"mask|labels?$|^(token_type|position)_ids$|^(idx|id|index|length|seq_lengths)$|_logps$")


def is_indexed(rows: Any) -> bool:
    """Whether rows have a length and numbers, so that reading some takes none from another reader: not so of a stream."""
    return not isinstance(rows, IterableDataset) and hasattr(rows, "__getitem__") and hasattr(rows, "__len__")


@dataclass(frozen=True, slots=True)
class Reader:
    """Copies of a trainer's training set and collator, through which rows are read without a change of the training."""

    rows: Any  # of the training set; empty where they are not read
    rows_reason: str  # why they are not read; else empty
    collate: Callable[[list[Any]], Batch] | None
    reason: str  # why the collator is not used; else empty
    columns: frozenset[str]  # that reach the collator in training; empty where they are not known

    @classmethod
    def copied(cls, loader: Any) -> Reader:
        rows, collate, reasons = (), None, ["", ""]
        if not is_indexed(loader.dataset):
            reasons[0] = "the training set is a stream, which is not read"
        else:
            try:
                rows = copy_reader(loader.dataset)
            except DataError as error:
                reasons[0] = f"the training set is not read before its end: {error}"
        try:
            collate = copy_reader(loader.collate_fn)
        except DataError as error:
            reasons[1] = f"the collator is not used before the training's end: {error}"
        return cls(rows, reasons[0], collate, reasons[1], _columns(rows))

    def completed(self, loader: Any) -> Reader:
        """Return a reader that reads what could not be copied as it is, after the last step."""
        rows = loader.dataset if self.rows_reason and is_indexed(loader.dataset) else self.rows
        return Reader(rows, "", self.collate or loader.collate_fn, "", _columns(rows))

    def batches(self, rows: Any, size: int, see: Callable[[Any], None] = lambda _: None) -> Iterator[Batch]:
        """Yield batches by the trainer's own collator, in the order of the rows; `see` is called with each row.

        Raises:
            DataError: the collator does not take the rows.
        """
        assert self.collate is not None
        pending = read_rows(rows)
        while chunk := list(islice(pending, size)):
            for row in chunk:
                see(row)
            inputs = [
                {key: value for key, value in row.items() if not self.columns or key in self.columns} for row in chunk
            ]
            try:
                batch = self.collate(inputs)
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise DataError(
                    f"SmallestAdapter: the trainer's collator does not take the held-out rows ({first_line(error)}); give "
                    "trainer.eval_dataset, which the trainer has tokenized"
                ) from None
            yield batch


def read_rows(rows: Any, count: int | None = None) -> Iterator[Any]:
    """Yield rows, at most `count`, by their numbers: an IndexError of the data set is an error, not an end."""
    return map(rows.__getitem__, range(len(rows) if count is None else min(count, len(rows))))


def require_mappings(rows: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    for row in rows:
        if not isinstance(row, Mapping):
            raise DataError(
                f"SmallestAdapter: a row is a {type(row).__name__}; give rows that are mappings, with input_ids and labels"
            )
        yield row


def _columns(rows: Any) -> frozenset[str]:
    """Return the columns of the first row; none where there is none."""
    return frozenset(next((row for row in read_rows(rows, 1) if isinstance(row, Mapping)), ()))


def read_moment_batches(
    reader: Reader, rows: Subset[Any], size: int, trained_rows: int
) -> tuple[list[Batch], float, int]:
    """Return batches for second moments, with estimates of the training's tokens and of the tokens for moments; no more rows are read."""
    read: list[Batch] = []
    tokens, moment_tokens, read_tokens = 0.0, 1, 0
    for batch in reader.batches(rows, size):
        read.append(batch)
        read_tokens += positions(batch)
        count = min(len(read) * size, len(rows))
        tokens = trained_rows * read_tokens / count
        moment_tokens = max(1, min(MOMENT_TOKENS, int(MOMENT_SHARE * tokens)))
        if read_tokens >= moment_tokens and count >= MIN_EXAMPLES:
            break
    return read, tokens, moment_tokens


def sample_batches(batches: Iterable[Batch]) -> list[Batch]:
    """Return a random sample of `MOMENT_BATCHES` batches of a list; of a loader, whose order is its own, the first ones."""
    if isinstance(batches, list | tuple):
        return [batches[index] for index in sample_indices(len(batches), MOMENT_BATCHES)]
    return list(islice(readable_copy(batches), MOMENT_BATCHES))


def readable_copy(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Return a copy of a loader, or the loader itself where it cannot be copied, as a generator cannot."""
    try:
        return cast(Iterable[Batch], copy_reader(batches))
    except DataError:
        return batches


def hash_inputs(row: Mapping[str, Any], columns: frozenset[str]) -> int:
    """A hash of what makes two rows the same example: all bytes of its inputs."""
    names = [name for name in sorted(row) if not columns or name in columns]
    inputs = [name for name in names if not NOT_CONTENT.search(name)] or names
    return hash(tuple((name, _plain(row[name])) for name in inputs))


def _plain(value: Any) -> Hashable:
    """A value that differs wherever its bytes do: of numbers in lists, arrays, tensors and images alike."""
    if isinstance(value, Mapping):
        return tuple((name, _plain(value[name])) for name in sorted(value))
    if isinstance(value, list | tuple) and not all(isinstance(part, int | float) for part in value):
        return tuple(map(_plain, value))
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value  # NumPy has no bfloat16
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        return repr(value)
    return array.shape, array.astype(np.float64 if array.dtype.kind == "f" else np.int64).tobytes()


def find_group_key(row: Mapping[str, Any], column: str | None) -> Hashable:
    """Return what rows that belong together share: the value of the column, or their prompt; None where a row stands for itself.

    Raises:
        DataError: the row has no value in the column.
    """
    value = row.get(column) if column else _prompt_of(row)
    is_missing = value is None or (isinstance(value, float | np.floating) and bool(np.isnan(value)))
    if column and is_missing:
        raise DataError(
            f"SmallestAdapter: a held-out row has no value in the column {column!r}; it has {', '.join(row)}: give eval_dataset with the "
            "column, or leave group out"
        )
    return None if is_missing else (_plain(value),)


def number_groups(keys: Sequence[Hashable], column: str | None) -> list[int]:
    """Return a number for each row: those that share one belong together.

    Raises:
        DataError: a column that groups nothing.
    """
    numbers_by_key: dict[Hashable, int] = {}
    numbers = [
        numbers_by_key.setdefault(at if key is None else key, len(numbers_by_key)) for at, key in enumerate(keys)
    ]
    if column and len(numbers_by_key) in (1, len(keys)):
        shared = "all held-out rows" if len(numbers_by_key) == 1 else "no two held-out rows"
        raise DataError(
            f"SmallestAdapter: {shared} share a value of the column {column!r}; give one with several values, each of several rows, or "
            "leave group out"
        )
    return numbers


def _prompt_of(row: Mapping[str, Any]) -> list[int] | None:
    """The tokens before the first one that counts; None where all count, where it is not known, and of packed rows."""
    for name in ("prompt_ids", "prompt_input_ids"):
        if name in row:
            return _listed(row[name])
    ids = _listed(row.get("input_ids"))
    for name in ("completion_mask", "assistant_masks", "labels"):
        marks = _listed(row.get(name))
        if "seq_lengths" not in row and marks is not None and ids is not None and len(marks) == len(ids):
            skipped = IGNORED if name == "labels" else 0
            return ids[: next((at for at, mark in enumerate(marks) if mark != skipped), 0)] or None
    return None


def _listed(value: Any) -> list[Any] | None:
    """Return the values of a row's cell as a list, whatever format the data set gives them in; None where it holds one value or none."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().tolist()
    elif hasattr(value, "__array__"):
        value = np.asarray(value).tolist()
    return list(value) if isinstance(value, list | tuple) else None
