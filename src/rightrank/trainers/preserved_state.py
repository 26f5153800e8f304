"""Preserve the state of another program: the model that it trains, and the random generators of the process and of its loaders."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from rightrank.training.kinds import find_lora_modules
from rightrank.training.loss import use_adapter

# The attributes through which a loader reaches what may hold a generator: its samplers, its data set and its collator.
LOADER_ATTRIBUTES = ("sampler", "batch_sampler", "dataset", "collate_fn", "data_collator")


GENERATORS = (torch.Generator, random.Random, np.random.Generator)


@contextmanager
def preserve_random_states(*loaders: Any) -> Iterator[None]:
    """Restore the global random states after the block, and the generators that are attributes of the loaders or of what they hold.

    A generator that the block creates as such an attribute, as collators do at first use, is removed again.
    """
    with ExitStack() as restored:
        restored.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        restored.callback(np.random.set_state, np.random.get_state())
        restored.callback(random.setstate, random.getstate())
        for owner in _find_owners(loaders):
            attributes = dict(vars(owner))
            restored.callback(_restore_generators, owner, attributes)
            for value in attributes.values():
                if isinstance(value, torch.Generator):
                    restored.callback(value.set_state, value.get_state())
                elif isinstance(value, random.Random):
                    restored.callback(value.setstate, value.getstate())
                elif isinstance(value, np.random.Generator):
                    restored.callback(setattr, value.bit_generator, "state", value.bit_generator.state)
        yield


def _find_owners(loaders: Iterable[Any]) -> list[Any]:
    """Return the loaders and what they hold, as far as it has attributes."""
    owners, pending = dict[int, Any](), list(loaders)
    while pending:
        owner = pending.pop()
        if id(owner) not in owners and hasattr(owner, "__dict__"):
            owners[id(owner)] = owner
            pending += [getattr(owner, name, None) for name in LOADER_ATTRIBUTES]
    return list(owners.values())


def _restore_generators(owner: Any, attributes: Mapping[str, Any]) -> None:
    for name, value in list(vars(owner).items()):
        if isinstance(value, GENERATORS) and name in attributes:
            setattr(owner, name, attributes[name])
        elif isinstance(value, GENERATORS):
            delattr(owner, name)


@contextmanager
def preserve_state(model: Any, name: str, *loaders: Any) -> Iterator[None]:
    """Evaluate the model with the adapter `name` within the block, and restore the model and random states exactly after it."""
    layers = find_lora_modules(model).values()
    factors = [
        factor_dict[name].weight
        for layer in layers
        for factor_dict in (layer.lora_A, layer.lora_B)
        if name in factor_dict
    ]
    weights = [(factor, factor.detach().clone()) for factor in factors]
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None
        model.eval()
        with use_adapter(model, name), preserve_random_states(*loaders):
            yield
    finally:
        with torch.no_grad():
            for weight, value in weights:
                weight.copy_(value)
        for parameter, required, gradient in parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
