"""Gradient checkpointing of a model's blocks, and its interaction with the key-value cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    try:
        with training_is(True, _checkpointed(model)):
            yield
    finally:
        disable()


@contextmanager
def kv_cache(model: Any) -> Iterator[None]:
    """Within the block, generation uses the key-value cache, which transformers turns off in checkpointed blocks."""
    with training_is(False, [block for block in _checkpointed(model) if block.training]):
        yield


def _checkpointed(model: Any) -> list[Any]:
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


@contextmanager
def training_is(value: bool, modules: Iterable[Any]) -> Iterator[None]:
    """Within the block, these modules alone are in training mode, or in evaluation mode; after it, in the other."""
    found = list(modules)
    for module in found:
        module.training = value
    try:
        yield
    finally:
        for module in found:
            module.training = not value
