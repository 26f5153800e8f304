"""Which items train together, and in which order: the same for every arm of a seed.

Each pass over the data is a fresh permutation. Within a window of batches, items are sorted by length so that
a batch pads little; the batches of a window are then shuffled. Every item is seen once a pass, whatever its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rightrank.engine.encode import IGNORED
from rightrank.engine.token_store import EncodedItem, lengths_of

WINDOW_BATCHES = 16


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded tensors of b items and n positions, and which items they are."""

    input_ids: torch.Tensor  # [b, n]
    attention_mask: torch.Tensor  # [b, n], 1 on real tokens
    labels: torch.Tensor  # [b, n], -100 where no loss is taken; [b] for a classification
    indices: tuple[int, ...]  # into the split
    tokens: int  # real tokens, no padding


def batch_plan(
    lengths: Sequence[int] | npt.NDArray[np.int64], batch_size: int, steps: int, seed: int
) -> list[list[int]]:
    """`steps` batches of `batch_size` item indices, drawn in passes over all items.

    A pass that does not fill its last batch is continued by the next pass.
    """
    generator = np.random.default_rng([seed, 0x8A7C])
    plan: list[list[int]] = []
    order = np.empty(0, np.int64)
    size = np.asarray(lengths)
    while len(plan) < steps:
        order = np.concatenate([order, generator.permutation(len(size))])
        whole = len(order) - len(order) % batch_size
        # A window never spans two passes: sorted by length, an item and its repetition would share a batch.
        for begin in range(0, whole, WINDOW_BATCHES * batch_size):
            if len(plan) >= steps:
                break
            window = order[begin : min(begin + WINDOW_BATCHES * batch_size, whole)]
            by_length: list[int] = window[np.lexsort((window, size[window]))].tolist()
            batches = [by_length[start : start + batch_size] for start in range(0, len(window), batch_size)]
            plan.extend(batches[position] for position in generator.permutation(len(batches)))
        order = order[whole:]
    return plan[:steps]


def collate(items: Sequence[EncodedItem], indices: Sequence[int], pad_id: int, device: torch.device) -> Batch:
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


def length_sorted_batches(items: Sequence[EncodedItem], batch_size: int) -> list[list[int]]:
    """All item indices in batches of like length, for evaluation: a fixed composition, so identical values."""
    order: list[int] = np.argsort(lengths_of(items), kind="stable").tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
