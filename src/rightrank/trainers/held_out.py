"""Choose the held-out rows of another trainer: a random sample of rows that are not in the training set."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Subset

from rightrank.data.sampling import sample_indices
from rightrank.schema.errors import DataError
from rightrank.trainers.distributed import gather_objects, get_process_index, get_world_size, sync_errors
from rightrank.trainers.trainer_rows import (
    MIN_EXAMPLES,
    RowReader,
    hash_inputs,
    is_indexable,
    iterate_rows,
    number_groups,
    require_mappings,
)

log = logging.getLogger("rightrank")

MAX_COMPARED_ROWS, MAX_COMPARISON_SECONDS = 100_000, 2.0  # limits of the search for held-out rows in the training set


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
    list(require_mappings(iterate_rows(reader.rows, 1)))
    for row in require_mappings(iterate_rows(sample)):
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
