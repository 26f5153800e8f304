"""Gradient checkpointing of a model's blocks, and its interaction with the key-value cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def gradient_checkpointing_on(model: Any) -> Iterator[None]:
    """Within the block, the backward pass recomputes the activations inside the model's blocks.

    transformers checkpoints only blocks in training mode. Only the blocks are put in training mode, so that the base's
    own dropout stays off.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    enable()
    blocks = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        for block in blocks:
            block.training = False
        disable()


@contextmanager
def kv_cache(model: Any) -> Iterator[None]:
    """Within the block, generation uses the key-value cache, which transformers turns off in checkpointed blocks."""
    blocks = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and m.training]
    for block in blocks:
        block.training = False
    try:
        yield
    finally:
        for block in blocks:
            block.training = True
