"""Attention in float32 on a CPU whose model is in 16 bits.

torch's fused attention for CPUs has no fast backward pass in bfloat16: with the casts included, it takes several times as
long as in float32, and it rounds more. On other devices attention runs as the model has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
