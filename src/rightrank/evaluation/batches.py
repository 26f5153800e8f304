"""Batches of examples: padded, or packed in one row.

Sequence packing joins the examples of a batch in one row, without padding and with attention limited to each example.

Everything in a transformer except attention works position by position, so packing does not change an example's values.
Position ids restart at every example. Attention runs torch's fused kernel on each example, and no mask is built.

`fast_paths.py` checks on real data whether a model supports packing: some models carry state from token to token by other
means than attention, or use an attention window that is shorter than an example.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rightrank.data.token_store import IGNORED, EncodedExample, TokenStore


@dataclass(frozen=True, slots=True)
class Batch:
    """The s sequences of several examples, right-padded to n positions or packed into one row (then `lengths` is set).

    Most examples have one sequence, so that s = b. A preference pair has two sequences, the chosen one first.
    """

    input_ids: torch.Tensor  # [s, n]
    attention_mask: torch.Tensor  # [s, n], 1 on real tokens
    labels: torch.Tensor  # [s, n], -100 where no loss is computed; [b] for classification
    indices: tuple[int, ...]  # positions of the b examples in the split
    tokens: int  # without padding
    lengths: tuple[int, ...] | None = None  # lengths of packed sequences; tensors are then [1, tokens]
    reference: torch.Tensor | None = None  # [s], log-probabilities of each sequence's labels under the base; pairs only

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def split_pairs(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split one value per sequence [s] into the values of the chosen answers and the values of the rejected answers."""
        return values[0::2], values[1::2]

    @property
    def sequences(self) -> int:
        return self.input_ids.shape[0] if self.lengths is None else len(self.lengths)

    def sequence_numbers(self) -> torch.Tensor:
        """Return the index of each position's sequence in the batch, in the shape of `input_ids`."""
        device = self.input_ids.device
        numbers = torch.arange(self.sequences, device=device)
        if self.lengths is None:
            return numbers[:, None].expand_as(self.input_ids)
        repeats, size = (
            torch.tensor(self.lengths, device=device),
            sum(self.lengths),
        )  # giving the size avoids a device synchronisation
        return numbers.repeat_interleave(repeats, output_size=size)[None]


def collate(examples: Sequence[EncodedExample], indices: Sequence[int], pad_id: int, device: torch.device) -> Batch:
    """Collate the sequences of the examples at `indices`, padded to the longest sequence."""
    selected = [examples[index] for index in indices]
    sequences = [sequence for example in selected for sequence in example.sequences()]
    longest = max(len(ids) for ids, _ in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    is_classification = len(selected[0].labels) == 1  # a text for a language model has at least two tokens
    labels = torch.full((len(sequences), 1 if is_classification else longest), IGNORED, dtype=torch.long)
    for row, (ids, sequence_labels) in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.as_tensor(ids)
        mask[row, : len(ids)] = 1
        labels[row, : len(sequence_labels)] = torch.as_tensor(sequence_labels)
    tokens = sum(example.length for example in selected)
    return Batch(
        input_ids.to(device),
        mask.to(device),
        (labels.squeeze(1) if is_classification else labels).to(device),
        tuple(indices),
        tokens,
    )


def batch_by_length(examples: TokenStore, batch_size: int) -> list[list[int]]:
    """Group all example indices into batches of similar length for evaluation.

    The composition of the batches is fixed, so repeated evaluations give exactly the same values.
    """
    order: list[int] = np.argsort(examples.lengths, kind="stable").tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class CacheBatches:
    """Batches of similar length and fixed composition, in which results of the base alone are computed once and cached.

    A resumed run computes the same batches and therefore reads the same bits.
    """

    def __init__(self, examples: TokenStore, expected: set[int], size: int) -> None:
        """Batch the examples whose indices are in `expected`. Any other example gets a batch of its own when it is used."""
        self.examples = examples
        self.batches: list[list[int]] = []
        self._batch_numbers: dict[int, int] = {}
        self._computed: set[int] = set()  # numbers of batches
        indices = np.asarray(sorted(expected), np.int64)
        sorted_indices: list[int] = indices[np.argsort(examples.lengths[indices], kind="stable")].tolist()
        for start in range(0, len(sorted_indices), size):
            group = sorted_indices[start : start + size]
            self._batch_numbers.update(dict.fromkeys(group, len(self.batches)))
            self.batches.append(group)

    def iterate_missing(self, indices: Iterable[int]) -> Iterator[list[int]]:
        """Yield the batches of these examples that are not computed yet. A batch counts as computed when the next one is requested."""
        numbers: set[int] = set()
        for index in indices:
            if index not in self._batch_numbers:
                self._batch_numbers[index] = len(self.batches)
                self.batches.append([index])
            numbers.add(self._batch_numbers[index])
        for number in sorted(numbers - self._computed):
            yield self.batches[number]
            self._computed.add(number)


FUSED_ATTENTION = "sdpa"  # transformers' name for torch's scaled_dot_product_attention


@contextmanager
def _replace_entry(table: Any, name: str, function: Any) -> Iterator[None]:
    original = table[name]
    table[name] = function
    try:
        yield
    finally:
        table[name] = original


@contextmanager
def use_float32_attention() -> Iterator[None]:
    functions: Any = ALL_ATTENTION_FUNCTIONS
    with _replace_entry(functions, FUSED_ATTENTION, partial(_attend_in_float32, functions[FUSED_ATTENTION])):
        yield


def _attend_in_float32(attend: Any, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    float_mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    output, weights = attend(module, query.float(), key.float(), value.float(), float_mask, **options)
    return output.to(query.dtype), weights


def pack_batch(batch: Batch) -> Batch:
    """Pack b padded examples into one row of their T real tokens; tensors are then [1, T].

    The first token of an example is not a label, because no token of the example precedes it.
    """
    real = batch.attention_mask.bool()
    labels = batch.labels.clone()
    labels[:, 0] = IGNORED
    lengths = tuple(batch.attention_mask.sum(1).tolist())
    return replace(
        batch,
        input_ids=batch.input_ids[real][None],
        attention_mask=batch.attention_mask[real][None],
        labels=labels[real][None],
        lengths=lengths,
    )


@contextmanager
def use_packed_attention(lengths: Sequence[int], device: torch.device) -> Iterator[None]:
    """Limit torch's fused attention to examples of these lengths within the block.

    On a CPU, each example is one call without padding. On other devices calls are expensive, so the examples are padded
    and processed in one call.
    """
    functions: Any = ALL_ATTENTION_FUNCTIONS
    masks: Any = ALL_MASK_ATTENTION_FUNCTIONS
    attend = functions[FUSED_ATTENTION]
    if device.type == "cpu":
        replacement = partial(_attend_per_example, attend, tuple(lengths))
    else:
        shape = len(lengths), max(lengths)
        begins = range(0, math.prod(shape), shape[1])
        rows = [torch.arange(begin, begin + n, device=device) for begin, n in zip(begins, lengths, strict=True)]
        replacement = partial(_attend_padded, attend, torch.cat(rows), shape)
    with (
        _replace_entry(functions, FUSED_ATTENTION, replacement),
        _replace_entry(masks, FUSED_ATTENTION, lambda *_, **__: None),
    ):
        yield


def _attend_per_example(
    attend: Any, lengths: tuple[int, ...], module: Any, query: Any, key: Any, value: Any, _mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Attend within each example: query, key, value [1, heads, T, d] → [1, T, heads, d]."""
    examples = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([attend(module, *example, None, **options)[0] for example in examples], dim=1), None


def _attend_padded(
    attend: Any, positions: torch.Tensor, shape: tuple[int, int], module: Any, *rows: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, None]:
    """Attend as `_attend_per_example` does, but in one call of b × n padded positions (`shape`).

    The row's T tokens have the indices `positions` among the padded positions.
    """
    padded: list[torch.Tensor] = []
    for row in rows[:3]:  # the fourth tensor is the mask
        heads, width = row.shape[1], row.shape[3]
        padded_row = row.new_zeros(heads, math.prod(shape), width).index_copy(1, positions, row[0])
        padded.append(padded_row.view(heads, *shape, width).transpose(0, 1))  # [b, heads, n, d]
    output = attend(module, *padded, None, **options)[0]
    return output.flatten(0, 1)[positions][None], None
