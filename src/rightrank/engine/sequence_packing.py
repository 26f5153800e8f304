"""The items of a batch end to end in one row: nothing is padded, and attention stays within each item.

Everything in a model but its attention works position by position, so a row of all items' tokens gives each what it
gives alone. Position numbers restart at every item. Attention, which torch's fused kernel computes, runs item by item
over views of the row; masks that keep items or padding apart are never made.

Which models this suits is checked on real data before use (`runtime.py`): some pass state from token to token by other
means, or look only so far back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rightrank.engine.attention import FUSED, replaced
from rightrank.engine.batches import Batch
from rightrank.engine.encode import IGNORED


def packed(batch: Batch) -> Batch:
    """The batch of b padded items as one row of all its T real tokens: tensors are [1, T].

    An item's first token is no label: nothing before it in the item predicts it.
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
    """[1, T]: each token's place in its item."""
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]


@contextmanager
def packed_attention(lengths: Sequence[int], device: torch.device) -> Iterator[None]:
    """Within the block, models that use torch's fused attention attend within items of these lengths only.

    On a CPU each item is a call of its own, and nothing is padded. Elsewhere calls are dear: one for all items, padded.
    """
    plain: Any = ALL_ATTENTION_FUNCTIONS[FUSED]
    ours = _by_item(plain, lengths) if device.type == "cpu" else _padded(plain, lengths, device)
    functions: Any = ALL_ATTENTION_FUNCTIONS
    masks: Any = ALL_MASK_ATTENTION_FUNCTIONS
    with replaced(functions, FUSED, ours), replaced(masks, FUSED, lambda *_, **__: None):
        yield


def _by_item(plain: Any, lengths: Sequence[int]) -> Any:
    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        """query, key, value [1, heads, T, d] → [1, T, heads, d]"""
        parts = zip(*(tensor.split(tuple(lengths), dim=2) for tensor in (query, key, value)), strict=True)
        return torch.cat([plain(module, *part, None, **options)[0] for part in parts], dim=1), None

    return attend


def _padded(plain: Any, lengths: Sequence[int], device: torch.device) -> Any:
    count, longest = len(lengths), max(lengths)
    begins = torch.arange(count, device=device) * longest
    places = begins.repeat_interleave(torch.tensor(lengths, device=device)) + position_ids(lengths, device)[0]

    def spread(row: torch.Tensor) -> torch.Tensor:
        """[1, heads, T, d] → [b, heads, n, d], zeros at the end of shorter items"""
        whole = row.new_zeros(row.shape[1], count * longest, row.shape[3]).index_copy(1, places, row[0])
        return whole.view(row.shape[1], count, longest, -1).transpose(0, 1)

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        output = plain(module, spread(query), spread(key), spread(value), None, **options)[0]
        return output.flatten(0, 1)[places][None], None

    return attend
