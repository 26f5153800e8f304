"""The batches of a training and their order: the same for every arm of a seed.

Each pass over the data is a fresh permutation, divided into batches in that order. Batches of like length need less
padding, but a step's loss is the mean over its labels, so a label in a batch of short examples would have more weight than
one in a batch of long examples. Sequence packing avoids padding without this bias (`sequence_packing.py`).
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
    """b examples as right-padded tensors of n positions, or packed into one row (`lengths` is then set)."""

    input_ids: torch.Tensor  # [b, n]
    attention_mask: torch.Tensor  # [b, n], 1 on real tokens
    labels: torch.Tensor  # [b, n], -100 where no loss is taken; [b] for classification
    indices: tuple[int, ...]  # of the examples in the split
    tokens: int  # without padding
    lengths: tuple[int, ...] | None = None  # of packed examples: tensors are [1, tokens]

    def example_numbers(self) -> torch.Tensor:
        """The number in the batch of each position's example, in the shape of `input_ids`."""
        device = self.input_ids.device
        if self.lengths is None:
            return torch.arange(len(self.indices), device=device)[:, None].expand_as(self.input_ids)
        counts = torch.tensor(self.lengths, device=device)
        return torch.arange(len(self.indices), device=device).repeat_interleave(counts)[None]


def batch_plan(examples: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """`steps` batches of `batch_size` example indices, drawn in passes over all examples.

    The next pass completes a batch that a pass does not fill.
    """
    generator = np.random.default_rng([seed, 0x8A7C])
    passes = -(-batch_size * steps // examples)
    order = np.concatenate([generator.permutation(examples) for _ in range(passes)])
    plan: list[list[int]] = order[: batch_size * steps].reshape(steps, batch_size).tolist()
    return plan


def batch_plan_by_length(lengths: npt.NDArray[np.int64], batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """As `batch_plan`, in batches of like length: each window of a pass is sorted by length and its batches shuffled.

    A window never spans two passes, because sorting would put an example and its repetition into one batch.
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


def collate(examples: Sequence[EncodedExample], indices: Sequence[int], pad_id: int, device: torch.device) -> Batch:
    """The examples at `indices`, padded to the longest."""
    chosen = [examples[index] for index in indices]
    longest = max(example.length for example in chosen)
    input_ids = torch.full((len(chosen), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(chosen), longest), dtype=torch.long)
    classification = len(chosen[0].labels) == 1 and longest > 1
    labels = torch.full((len(chosen), 1 if classification else longest), IGNORED, dtype=torch.long)
    for row, example in enumerate(chosen):
        input_ids[row, : example.length] = torch.as_tensor(example.input_ids)
        mask[row, : example.length] = 1
        labels[row, : len(example.labels)] = torch.as_tensor(example.labels)
    tokens = sum(example.length for example in chosen)
    return Batch(
        input_ids.to(device),
        mask.to(device),
        (labels.squeeze(1) if classification else labels).to(device),
        tuple(indices),
        tokens,
    )


def length_sorted_batches(examples: Sequence[EncodedExample], batch_size: int) -> list[list[int]]:
    """All example indices in batches of like length, for evaluation. The composition is fixed, so values repeat exactly."""
    order: list[int] = np.argsort(lengths_of(examples), kind="stable").tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
