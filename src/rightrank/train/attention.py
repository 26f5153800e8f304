"""Sequence packing: the examples of a batch joined in one row, without padding and with attention within each example.

Everything in a transformer except attention works position by position, so a packed row gives each example what it gives
alone. Position ids restart at every example. Attention runs torch's fused kernel on each example; no mask is built.

`fast_paths.py` checks on real data whether a model can be packed: some models pass state from token to token by other means
than attention, or attend to a window shorter than an example.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rightrank.train.batches import Batch
from rightrank.train.tokens import IGNORED

FUSED = "sdpa"  # transformers' name for torch's scaled_dot_product_attention


def wants_float32(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


@contextmanager
def replaced(table: Any, name: str, function: Any) -> Iterator[None]:
    """Within the block, `function` is registered under `name` in one of transformers' public tables."""
    before = table[name]
    table[name] = function
    try:
        yield
    finally:
        del table[name]
        if table[name] is not before:  # nested replacements
            table[name] = before


@contextmanager
def float32_attention() -> Iterator[None]:
    """Within the block, torch's fused attention computes in float32."""
    functions: Any = ALL_ATTENTION_FUNCTIONS
    plain = functions[FUSED]

    def in_float32(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        wide = mask.float() if mask is not None and mask.is_floating_point() else mask
        output, weights = plain(module, query.float(), key.float(), value.float(), wide, **options)
        return output.to(query.dtype), weights

    with replaced(functions, FUSED, in_float32):
        yield


def packed(batch: Batch) -> Batch:
    """A batch of b padded examples as one row of its T real tokens: tensors are [1, T].

    The first token of an example is not a label, because nothing in the example precedes it.
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


def position_ids(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """[1, T]: the position of each token in its example."""
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]


@contextmanager
def packed_attention(lengths: Sequence[int], device: torch.device) -> Iterator[None]:
    """Within the block, torch's fused attention attends within examples of these lengths.

    On a CPU each example is one call, without padding. On other devices calls are expensive, so the examples are padded
    for one call.
    """
    plain: Any = ALL_ATTENTION_FUNCTIONS[FUSED]
    ours = _by_example(plain, lengths) if device.type == "cpu" else _padded(plain, lengths, device)
    functions: Any = ALL_ATTENTION_FUNCTIONS
    masks: Any = ALL_MASK_ATTENTION_FUNCTIONS
    with replaced(functions, FUSED, ours), replaced(masks, FUSED, lambda *_, **__: None):
        yield


def _by_example(plain: Any, lengths: Sequence[int]) -> Any:
    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        """query, key, value [1, heads, T, d] → [1, T, heads, d]"""
        parts = zip(*(tensor.split(tuple(lengths), dim=2) for tensor in (query, key, value)), strict=True)
        return torch.cat([plain(module, *part, None, **options)[0] for part in parts], dim=1), None

    return attend


def _padded(plain: Any, lengths: Sequence[int], device: torch.device) -> Any:
    count, longest = len(lengths), max(lengths)
    begins = torch.arange(count, device=device) * longest
    places = begins.repeat_interleave(torch.tensor(lengths, device=device)) + position_ids(lengths, device)[0]

    def padded(row: torch.Tensor) -> torch.Tensor:
        """[1, heads, T, d] → [b, heads, n, d], zeros at the end of shorter examples"""
        whole = row.new_zeros(row.shape[1], count * longest, row.shape[3]).index_copy(1, places, row[0])
        return whole.view(row.shape[1], count, longest, -1).transpose(0, 1)

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        output = plain(module, padded(query), padded(key), padded(value), None, **options)[0]
        return output.flatten(0, 1)[places][None], None

    return attend
