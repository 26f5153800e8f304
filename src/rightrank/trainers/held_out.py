"""Read the rows of another trainer without affecting the training: a sample of held-out rows that are not in the training set, and their groups."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, Subset

from rightrank.data.sampling import are_instructions, sample_indices
from rightrank.data.token_store import IGNORED
from rightrank.schema.errors import DataError, get_first_line
from rightrank.trainers.batch_scores import CUSTOM_EVALUATION_HINT, Batch, count_positions
from rightrank.trainers.in_memory import gather_objects, get_process_index, get_world_size, sync_errors
from rightrank.training.moments import MOMENT_TOKENS

log = logging.getLogger("rightrank")

MIN_EXAMPLES = 30
MAX_MOMENT_BATCHES = 64  # batches that are read for second moments
MOMENT_TOKEN_FRACTION = 0.02  # of the training's tokens; used for second moments
MAX_COMPARED_ROWS, MAX_COMPARISON_SECONDS = 100_000, 2.0  # limits of the search for held-out rows in the training set
# Columns that do not identify an example: masks and labels, which follow from its tokens, and row numbers.
NON_INPUT_COLUMNS = re.compile(r"mask|labels?$|^(token_type|position)_ids$|^(idx|id|index|length|seq_lengths)$|_logps$")


def is_indexable(rows: Any) -> bool:
    """Return whether rows have a length and access by index. Streams do not: reading them takes rows from other readers."""
    return not isinstance(rows, IterableDataset) and hasattr(rows, "__getitem__") and hasattr(rows, "__len__")


@dataclass(frozen=True, slots=True)
class RowReader:
    """A trainer's training set and collator. `preserve_state` keeps their random generators."""

    rows: Any  # of the training set; empty if it is a stream
    collate: Callable[[list[Any]], Batch]
    columns: frozenset[str]  # columns that reach the collator in training; empty if unknown
    query: str | None = None  # the column whose value identifies a group by default, if it is not the prompt

    @classmethod
    def from_loader(cls, loader: Any, has_queries: bool) -> RowReader:
        """Read the first row of the training set. With `has_queries`, its first column holds the queries."""
        rows: Any = loader.dataset if is_indexable(loader.dataset) else ()
        columns = list(rows[0]) if len(rows) and isinstance(rows[0], Mapping) else []
        return cls(rows, loader.collate_fn, frozenset(columns), columns[0] if has_queries and columns else None)

    def find_group_key(self, row: Mapping[str, Any], column: str | None) -> Hashable:
        """Return the value that rows of one group share: that in `column`, in the column of queries, or the prompt; None if there is none.

        Raises:
            DataError: the row has no value in the column.
        """
        column = column or self.query
        value = row.get(column) if column else _find_prompt_tokens(row)
        is_missing = value is None or (isinstance(value, float | np.floating) and bool(np.isnan(value)))
        if column and is_missing:
            raise DataError(
                f"SmallestAdapter: a held-out row has no value in the column {column!r}; it has {', '.join(row)}: give eval_dataset with the "
                "column, or leave group out"
            )
        return None if is_missing else (_to_hashable(value),)

    def read_batches(self, rows: Any, size: int, on_row: Callable[[Any], None] = lambda _: None) -> Iterator[Batch]:
        """Yield batches from the trainer's own collator, in the order of the rows. `on_row` is called with each row.

        Raises:
            DataError: the collator does not accept the rows.
        """
        remaining_rows = iterate_rows(rows)
        while chunk := list(islice(remaining_rows, size)):
            for row in chunk:
                on_row(row)
            inputs = [
                {key: value for key, value in row.items() if not self.columns or key in self.columns} for row in chunk
            ]
            try:
                batch = self.collate(inputs)
            except (KeyError, ValueError) as error:  # of a missing column, and of columns that make no tensor
                raise DataError(
                    f"SmallestAdapter: the trainer's collator does not accept the held-out rows ({get_first_line(error)}); give "
                    "trainer.eval_dataset, which the trainer has tokenized"
                ) from None
            if not isinstance(batch, Mapping):
                raise DataError(
                    f"SmallestAdapter: the trainer's collator returns a {type(batch).__name__} and no batch of tensors, as for GRPO, which "
                    f"generates its answers; {CUSTOM_EVALUATION_HINT}"
                )
            yield batch


def iterate_rows(rows: Any) -> Iterator[Any]:
    """Yield rows by index, so that an IndexError of the data set is raised instead of ending the iteration."""
    return map(rows.__getitem__, range(len(rows)))


def read_moment_batches(
    reader: RowReader, rows: Subset[Any], size: int, trained_rows: int
) -> tuple[list[Batch], float, int]:
    """Read batches for second moments until they have enough tokens.

    Returns:
        `(batches, estimated tokens of the training, tokens to use for moments)`.
    """
    batches: list[Batch] = []
    tokens, moment_tokens, read_tokens = 0.0, 1, 0
    for batch in reader.read_batches(rows, size):
        batches.append(batch)
        read_tokens += count_positions(batch)
        count = min(len(batches) * size, len(rows))
        tokens = trained_rows * read_tokens / count
        moment_tokens = max(1, min(MOMENT_TOKENS, int(MOMENT_TOKEN_FRACTION * tokens)))
        if read_tokens >= moment_tokens and count >= MIN_EXAMPLES:
            break
    return batches, tokens, moment_tokens


def select_held_out_rows(
    rows: Any, reader: RowReader, max_examples: int, group: str | None
) -> tuple[Subset[Any], list[str]]:
    """Return a random sample of the held-out rows that are not in the training set, and notes. Rows are read when they are used.

    Raises:
        DataError: no rows, rows without a length or access by index, rows that are not mappings, rows that `group` does not divide into groups,
            or fewer than two remaining rows.
    """
    if isinstance(rows, Mapping):
        raise DataError(
            f"SmallestAdapter: the trainer's eval_dataset has {len(rows)} data sets ({', '.join(rows)}); give one of them as eval_dataset="
        )
    if not is_indexable(rows):
        raise DataError(
            "SmallestAdapter has no held-out rows that it can sample, because sampling needs a length and access by index (a stream has neither): "
            "give the trainer such an eval_dataset, or give SmallestAdapter a list of a few hundred rows as eval_dataset="
        )
    sample = Subset(rows, sample_indices(len(rows), max_examples))
    input_hashes, group_keys = [], []
    for row in iterate_rows(sample):
        if not isinstance(row, Mapping):
            raise DataError(
                f"SmallestAdapter: a row is a {type(row).__name__}; give mappings with input_ids and labels"
            )
        input_hashes.append(hash_inputs(row, reader.columns))
        group_keys.append(reader.find_group_key(row, group))
    shared_hashes, notes = _find_shared_inputs(input_hashes, reader)
    unseen_indices = [index for index, input_hash in enumerate(input_hashes) if input_hash not in shared_hashes]
    if len(unseen_indices) < len(input_hashes):
        notes.append(
            f"{len(input_hashes) - len(unseen_indices)} of {len(input_hashes)} held-out rows are also in the training set; they are left out"
        )
    if len(unseen_indices) < 2:
        raise DataError(
            "SmallestAdapter: the held-out rows are in the training set; give rows that are not in it"
            if len(input_hashes) > 1
            else f"SmallestAdapter: {len(input_hashes)} held-out rows are too few; give a few hundred"
        )
    if len(unseen_indices) < MIN_EXAMPLES:
        log.warning(
            "rightrank: %d held-out examples are too few for a reliable result; give a few hundred", len(unseen_indices)
        )
    number_groups([group_keys[index] for index in unseen_indices], group)  # raises if the column forms no groups
    return Subset(rows, [sample.indices[index] for index in unseen_indices]), notes


def _find_shared_inputs(input_hashes: Sequence[int], reader: RowReader) -> tuple[set[int], list[str]]:
    """Return the input hashes that also occur in the training set, as far as it was read within `MAX_COMPARISON_SECONDS`.

    Each process compares its share of the rows, and all of them return the same set. A note states how many rows were compared.
    """
    if not len(reader.rows):
        return set(), ["the training set is a stream and is not read; held-out rows were not looked for in it"]
    index_by_hash = {input_hash: index for index, input_hash in reversed(list(enumerate(input_hashes)))}
    sampled_indices = sample_indices(len(reader.rows), MAX_COMPARED_ROWS)[get_process_index() :: get_world_size()]
    deadline, num_compared, leaked_indices = time.monotonic() + MAX_COMPARISON_SECONDS, 0, set()
    with sync_errors():
        for index in sampled_indices:
            if time.monotonic() > deadline:
                break
            leaked_index = index_by_hash.get(hash_inputs(reader.rows[index], reader.columns))
            leaked_indices |= set() if leaked_index is None else {leaked_index}
            num_compared += 1
    # Indices are exchanged instead of hashes, because each process hashes strings differently.
    by_process = gather_objects((num_compared, leaked_indices))
    total_compared = sum(count for count, _ in by_process)
    notes = []
    if total_compared < len(reader.rows):
        notes.append(
            f"{total_compared:,} of {len(reader.rows):,} training rows (a random sample) were compared with the held-out rows within {MAX_COMPARISON_SECONDS:g} s; "
            "the others may contain held-out rows"
        )
    return {input_hashes[leaked_index] for _, shared in by_process for leaked_index in shared}, notes


def hash_inputs(row: Mapping[str, Any], columns: frozenset[str]) -> int:
    """Return a hash of all bytes of a row's inputs without padding. Rows with equal hashes are the same example."""
    names = [name for name in sorted(row) if not columns or name in columns]
    inputs = [name for name in names if not NON_INPUT_COLUMNS.search(name)] or names
    return hash(tuple((name, _to_hashable(_remove_padding(row, name))) for name in inputs))


def _remove_padding(row: Mapping[str, Any], name: str) -> Any:
    """Return the values in a column, of tokens only those that their attention mask marks."""
    prefix, is_tokens, _ = name.rpartition("input_ids")
    ids, mask = (_to_list(row.get(f"{prefix}{column}")) for column in ("input_ids", "attention_mask"))
    if not is_tokens or ids is None or mask is None or len(mask) != len(ids):
        return row[name]
    return [token for token, is_marked in zip(ids, mask, strict=True) if is_marked]


def _to_hashable(value: Any) -> Hashable:
    """Convert a value to a hashable one that keeps all its bytes. Equal numbers in lists, arrays, tensors and images stay equal."""
    if isinstance(value, Mapping):
        return tuple((name, _to_hashable(value[name])) for name in sorted(value))
    if isinstance(value, list | tuple) and not all(isinstance(element, int | float) for element in value):
        return tuple(map(_to_hashable, value))
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value  # NumPy has no bfloat16
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        return repr(array.tolist() if isinstance(value, np.ndarray) else value)  # repr shortens long arrays
    return array.shape, array.astype(np.float64 if array.dtype.kind == "f" else np.int64).tobytes()


def number_groups(keys: Sequence[Hashable], column: str | None) -> list[int]:
    """Return the number of each row's group. Without a column, a few prompts are instructions, which form no groups.

    Raises:
        DataError: the column has one value in all rows, or a different value in each row.
    """
    numbers_by_key: dict[Hashable, int] = {}
    numbers = [
        numbers_by_key.setdefault(index if key is None else key, len(numbers_by_key)) for index, key in enumerate(keys)
    ]
    if column and len(numbers_by_key) in (1, len(keys)):
        subject = "all held-out rows" if len(numbers_by_key) == 1 else "no two held-out rows"
        raise DataError(
            f"SmallestAdapter: {subject} share a value of the column {column!r}; give a column in which several rows share each value, or "
            "leave group out"
        )
    return list(range(len(keys))) if not column and are_instructions(len(numbers_by_key), len(keys)) else numbers


def _find_prompt_tokens(row: Mapping[str, Any]) -> list[int] | None:
    """Return the tokens before the first one with a loss.

    Return None if all tokens have a loss, if it is unknown which ones do, and for packed rows.
    """
    for name in ("prompt_ids", "prompt_input_ids"):
        if name in row:
            return _to_list(row[name])
    ids = _to_list(row.get("input_ids"))
    for name in ("completion_mask", "assistant_masks", "labels"):
        mask = _to_list(row.get(name))
        if "seq_lengths" not in row and mask is not None and ids is not None and len(mask) == len(ids):
            ignored_value = IGNORED if name == "labels" else 0
            return ids[: next((index for index, value in enumerate(mask) if value != ignored_value), 0)] or None
    return None


def _to_list(value: Any) -> list[Any] | None:
    """Return the values of a cell as a list, for every format of `datasets`. Return None for a single value or none."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().tolist()
    elif hasattr(value, "__array__"):
        value = np.asarray(value).tolist()
    return list(value) if isinstance(value, list | tuple) else None
