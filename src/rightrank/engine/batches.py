"""Which items train together, and in which order: the same for every arm of a seed.

Each pass over the data is a fresh permutation, cut into batches as it comes. Batches of like length would pad less,
but a step's loss is a mean over its labels: a label in a batch of short items would weigh more than one in a batch of
long items. Where it can be, items are joined into one row instead (`sequence_packing.py`), and nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rightrank.engine.encode import IGNORED
from rightrank.engine.token_store import EncodedExample, lengths_of

WINDOW_BATCHES = 16


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded tensors of b items and n positions, and which items they are; or joined, all in one row."""

    input_ids: torch.Tensor  # [b, n]
    attention_mask: torch.Tensor  # [b, n], 1 on real tokens
    labels: torch.Tensor  # [b, n], -100 where no loss is taken; [b] for a classification
    indices: tuple[int, ...]  # into the split
    tokens: int  # real tokens, no padding
    lengths: tuple[int, ...] | None = None  # of the items, where they are joined: tensors are [1, tokens]

    def example_numbers(self) -> torch.Tensor:
        """Of every position, the number of its item in the batch; shaped as `input_ids`."""
        device = self.input_ids.device
        if self.lengths is None:
            return torch.arange(len(self.indices), device=device)[:, None].expand_as(self.input_ids)
        counts = torch.tensor(self.lengths, device=device)
        return torch.arange(len(self.indices), device=device).repeat_interleave(counts)[None]


def batch_plan(items: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """`steps` batches of `batch_size` of the numbers under `items`, drawn in passes over all of them.

    A pass that does not fill its last batch is continued by the next pass.
    """
    generator = np.random.default_rng([seed, 0x8A7C])
    passes = -(-batch_size * steps // items)
    order = np.concatenate([generator.permutation(items) for _ in range(passes)])
    plan: list[list[int]] = order[: batch_size * steps].reshape(steps, batch_size).tolist()
    return plan


def batch_plan_by_length(lengths: npt.NDArray[np.int64], batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """The same with batches of like length: windows of a pass sorted by length, their batches shuffled.

    A window never spans two passes: sorted, an item and its repetition would share a batch.
    """
    generator = np.random.default_rng([seed, 0x8A7C])
    plan: list[list[int]] = []
    order = np.empty(0, np.int64)
    while len(plan) < steps:
        order = np.concatenate([order, generator.permutation(len(lengths))])
        whole = len(order) - len(order) % batch_size
        for begin in range(0, whole, WINDOW_BATCHES * batch_size):
            window = order[begin : min(begin + WINDOW_BATCHES * batch_size, whole)]
            by_length = window[np.lexsort((window, lengths[window]))].reshape(-1, batch_size)
            plan.extend(by_length[generator.permutation(len(by_length))].tolist())
        order = order[whole:]
    return plan[:steps]


def collate(items: Sequence[EncodedExample], indices: Sequence[int], pad_id: int, device: torch.device) -> Batch:
    """Pad the items at `indices` to their longest."""
    chosen = [items[index] for index in indices]
    longest = max(item.length for item in chosen)
    input_ids = torch.full((len(chosen), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(chosen), longest), dtype=torch.long)
    classification = len(chosen[0].labels) == 1 and longest > 1
    labels = torch.full((len(chosen), 1 if classification else longest), IGNORED, dtype=torch.long)
    for row, item in enumerate(chosen):
        input_ids[row, : item.length] = torch.as_tensor(item.input_ids)
        mask[row, : item.length] = 1
        labels[row, : len(item.labels)] = torch.as_tensor(item.labels)
    tokens = sum(item.length for item in chosen)
    return Batch(
        input_ids.to(device),
        mask.to(device),
        (labels.squeeze(1) if classification else labels).to(device),
        tuple(indices),
        tokens,
    )


def length_sorted_batches(items: Sequence[EncodedExample], batch_size: int) -> list[list[int]]:
    """All item indices in batches of like length, for evaluation: a fixed composition, so identical values."""
    order: list[int] = np.argsort(lengths_of(items), kind="stable").tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
