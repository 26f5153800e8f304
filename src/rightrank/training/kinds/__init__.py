"""The kinds of adapted layers: linear (`linear.py`), embeddings, convolutions, DoRA, fused experts, and unknown ones.

`adapters.kinds` describes how their factors are stored.

DoRA (Liu et al. 2024): W = m · (W₀ + s·B·A) / ‖W₀ + s·B·A‖, with a trained magnitude m for each row of W. PEFT initializes the
magnitudes to ‖W₀‖, so that an untrained adapter changes nothing. The norm of a row depends on the adapter, and the backward pass treats
it as a constant, as PEFT does.

The adapter of fused experts is added to their parameter before the layer runs, so one pass holds one adapter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from rightrank.adapters.kinds import name_experts
from rightrank.training.kinds.base import AdapterKind, InitialDraw
from rightrank.training.kinds.linear import Linear

CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


class _Embedding(AdapterKind):
    """A `torch.nn.Embedding`. A and B have the names of a linear layer's factors, with their roles swapped."""

    label = "an embedding"
    unshared_reason = "only PEFT's own forward pass computes it"

    def can_adapt(self, module: Any) -> bool:
        return isinstance(module.base_layer, torch.nn.Embedding) and not module.lora_variant

    def initialize(self, module: Any, adapter: str, draw: InitialDraw) -> None:
        b = module.lora_embedding_B[adapter]
        module.lora_embedding_A[adapter].zero_()
        b.copy_(draw.draw_normal(b.shape[1], b.shape[0]).T.to(b))


class _Convolution(AdapterKind):
    """A `Conv1d`, `Conv2d` or `Conv3d` without groups."""

    label = "a convolution"
    unshared_reason = "only PEFT's own forward pass computes it"
    unselectable_reason = "select trains text models; select_rank_with trains convolutions"

    def can_adapt(self, module: Any) -> bool:
        return isinstance(module.get_base_layer(), CONVOLUTIONS) and not module.lora_variant

    def get_shapes(self, module: Any) -> list[tuple[str, int, int]]:
        layer = module.get_base_layer()
        return [("", int(layer.out_channels), int(layer.in_channels) * math.prod(layer.kernel_size))]


class _Dora(AdapterKind):
    """DoRA on a linear layer, an embedding or a convolution."""

    label = "DoRA"
    unshared_reason = "each adapter has its own norm of every row of the weight"

    def can_adapt(self, module: Any) -> bool:
        variants = [type(variant).__name__ for variant in module.lora_variant.values()]
        return bool(variants) and all(name.startswith("Dora") for name in variants)

    def get_shapes(self, module: Any) -> list[tuple[str, int, int]]:
        if isinstance(module.get_base_layer(), CONVOLUTIONS):
            return _Convolution().get_shapes(module)
        return super().get_shapes(module)

    def initialize(self, module: Any, adapter: str, draw: InitialDraw) -> None:
        if adapter in module.lora_embedding_A:
            _Embedding().initialize(module, adapter, draw)
        else:
            super().initialize(module, adapter, draw)


class _UnknownKind(AdapterKind):
    """A layer that no other kind claims."""

    label = "an adapter of an unknown kind"
    unshared_reason = "only PEFT's own forward pass computes it"
    untruncatable_reason = "the meaning of its tensors is unknown"

    def can_adapt(self, module: Any) -> bool:
        return True

    def initialize(self, module: Any, adapter: str, draw: InitialDraw) -> None:
        """Keep PEFT's own initialization, which uses the arm's seed.

        A plain layer whose only difference is a bias of B (`lora_bias`) is initialized as a linear layer.
        """
        if any(module.lora_bias.values()) and not module.lora_variant and adapter in module.lora_A:
            super().initialize(module, adapter, draw)


class _Experts(AdapterKind):
    """Fused experts, which PEFT adapts through a `ParamWrapper`."""

    label = "adapters on fused experts (target_parameters)"
    unshared_reason = "an expert's rows come from any example"

    def can_adapt(self, module: Any) -> bool:
        return type(module).__name__ == "ParamWrapper" and not module.lora_variant

    def get_shapes(self, module: Any) -> list[tuple[str, int, int]]:
        rows, columns = int(module.out_features), int(module.in_features)
        return [(name, rows, columns) for name in name_experts(module.parameter_name, int(module.num_experts))]

    def initialize(self, module: Any, adapter: str, draw: InitialDraw) -> None:
        a, experts = module.lora_A[adapter].weight, int(module.num_experts)
        rank = a.shape[0] // experts
        drawn = [draw.draw_rows(rank, a.shape[1], expert) for expert in range(experts)]
        a.copy_(torch.cat(drawn).to(a))
        module.lora_B[adapter].weight.zero_()


KINDS: tuple[AdapterKind, ...] = (_Experts(), _Dora(), _Embedding(), _Convolution(), Linear(), _UnknownKind())
"""All kinds. The first one that claims a module describes it; the last one claims any module."""


def find_lora_modules(peft_model: Any) -> dict[str, Any]:
    """Return the adapted modules by their names in the base model."""
    base = peft_model.base_model.model
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def set_update_to_zero(peft_model: Any, adapter: str) -> None:
    """Set the update of an adapter in memory to zero, as for rank 0. Other trained modules keep their values."""
    with torch.no_grad():
        for module in find_lora_modules(peft_model).values():
            module.lora_variant.pop(adapter, None)  # DoRA would scale the rows of the base
            for factors in (module.lora_B, module.lora_embedding_B):
                if adapter in factors:
                    factor = factors[adapter]
                    for tensor in factor.parameters() if isinstance(factor, torch.nn.Module) else [factor]:
                        tensor.zero_()


def find_kind(module: Any) -> AdapterKind:
    return next(kind for kind in KINDS if kind.can_adapt(module))
