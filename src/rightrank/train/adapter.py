"""One arm's adapter on the base: added by PEFT, initialised from the seed's draw, and removed again.

Rank r takes the first r rows of the draw of each module's A, so arms of one seed differ only in their further rows. The
distributions are PEFT's: A is uniform in ±1/√in_features (`default`) or normal with standard deviation 1/r (`gaussian`),
and B is zero. The kind of a module says which tensors these are (`rightrank.models.kinds`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from rightrank.models.kinds import kind_of
from rightrank.models.kinds.base import Draw
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm
from rightrank.train.targets import without_peft_noise

ADAPTER = "default"  # PEFT's name for the only adapter of a model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block, torch draws from `seed`: the start of what PEFT alone initialises."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def wrapped(model: Any, config: LoraConfig, adapter: str = ADAPTER) -> Any:
    """PEFT's model around the base. New modules are in evaluation mode, the base's modules keep their mode."""
    in_training = [module for module in model.modules() if module.training]  # checkpointed blocks
    with without_peft_noise():
        peft_model: Any = get_peft_model(model, config, adapter_name=adapter)
    peft_model.train(False)
    for module in in_training:
        module.training = True
    return peft_model


def unwrapped(peft_model: Any) -> Any:
    """The base without PEFT's layers, frozen.

    PEFT's `unload` leaves the trained copy of each module in `modules_to_save` (a classification head, for example) in
    the base. This function puts the base's own module back, so that the next arm does not start from a trained one.
    """
    originals = {
        name: module.original_module
        for name, module in peft_model.base_model.model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    base = peft_model.unload()
    for name, module in originals.items():
        base.set_submodule(name, module)
    base.requires_grad_(False)
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


def lora_modules(peft_model: Any) -> dict[str, Any]:
    """The adapted modules by their name in the base model."""
    base = peft_model.base_model.model
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def initialise(peft_model: Any, arm: Arm, settings: SelectSettings, adapter: str = ADAPTER) -> None:
    """Set the arm's adapter to its first values, by the kind of each module."""
    for name, module in lora_modules(peft_model).items():
        if adapter in module.lora_A or adapter in module.lora_embedding_A:
            kind_of(module).start(module, adapter, Draw(arm.seed, name, settings.init_lora_weights))
