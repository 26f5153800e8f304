"""Check that PEFT loads an adapter folder, on a skeleton of the adapted modules and without memory for weights.

PEFT's own code reads the configuration, creates the layers and assigns the tensors. What it refuses here, it would refuse on the base model too:
an initialization that does not support the rank, a pattern or a shape that contradicts the tensors, or a module that the targets do not name.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn

from rightrank.adapters.adapter_folders import CONFIG_FILE, PEFT_PREFIX
from rightrank.adapters.adapter_reader import AdapterFolder, AdapterModule
from rightrank.adapters.kinds import WRAPPER_SUFFIX
from rightrank.schema.errors import ModelError, get_first_line

CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}  # by the dimensions of A
# Options that concern the weights of the base model, or modules and tensors that the skeleton does not have.
IGNORED_OPTIONS = (
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "megatron_config",
    "loftq_config",
    "runtime_config",
)


def require_loadable(adapter: AdapterFolder) -> None:
    """Raise if PEFT does not load the factors of an adapter on a skeleton of the modules that they adapt.

    Raises:
        ModelError: PEFT refuses the configuration or the tensors.
    """
    if adapter.foreign is not None or any(WRAPPER_SUFFIX in module.a_key for module in adapter.modules):
        return  # not PEFT's format, or layers inside layers, of which the file does not say what holds them
    shapes = adapter.file.shapes
    other_keys = {*adapter.other_keys}
    tensors = {
        key.removeprefix(PEFT_PREFIX): torch.empty(shape, device="meta")
        for key, shape in shapes.items()
        if key not in other_keys
    }
    try:
        # The load on the base shows the warnings; the random state of a training that continues is kept.
        with warnings.catch_warnings(action="ignore"), torch.random.fork_rng(devices=[]):
            model = inject_adapter_in_model(
                _build_lora_config(adapter), _build_skeleton(adapter, shapes), low_cpu_mem_usage=True
            )
            result: Any = set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    except (
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        re.error,
    ) as error:  # a value of another type
        raise ModelError(
            f"{adapter.path}: PEFT can't load it ({get_first_line(error)}); correct its {CONFIG_FILE}"
        ) from None
    if result.unexpected_keys:
        key = result.unexpected_keys[0]
        raise ModelError(
            f"{adapter.path}: PEFT does not load {key}, because target_modules does not name its module; correct its {CONFIG_FILE}"
        )


def _build_lora_config(adapter: AdapterFolder) -> LoraConfig:
    """Return the configuration of the factors, without an initialization that would read the weights of the base model."""
    fields = LoraConfig.__dataclass_fields__
    config = {name: value for name, value in adapter.config.items() if name in fields and name not in IGNORED_OPTIONS}
    if adapter.base_changing_init is not None:
        config["init_lora_weights"] = True
    if config.get("target_modules") == "all-linear":  # PEFT expands it on models of transformers alone
        config["target_modules"] = [module.name for module in adapter.modules]
    return LoraConfig(**config)


def _build_skeleton(adapter: AdapterFolder, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    root = nn.Module()
    with torch.device("meta"):
        for pair in adapter.pairs:
            *parents, name = pair[0].address.split(".")
            parent = root
            for step in parents:
                if not hasattr(parent, step):
                    parent.add_module(step, nn.Module())
                parent = parent.get_submodule(step)
            if pair[0].kind.name == "expert":
                parent.register_parameter(name, _build_expert_parameter(pair))
            else:
                parent.add_module(name, _build_layer(pair[0], shapes))
    return root


def _build_expert_parameter(pair: list[AdapterModule]) -> nn.Parameter:
    return nn.Parameter(torch.empty(len(pair), pair[0].rows, pair[0].columns), requires_grad=False)


def _build_layer(module: AdapterModule, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Build the layer that the factors adapt."""
    a, b = shapes[module.a_key], shapes[module.b_key]
    if module.kind.name == "embedding":
        return nn.Embedding(a[1], b[0])
    if module.kind.name == "convolution":
        layer: nn.Module = CONVOLUTIONS[len(a)](a[1], b[0], a[2:])
        return layer
    return nn.Linear(math.prod(a[1:]), b[0], bias=module.bias_key is not None)
