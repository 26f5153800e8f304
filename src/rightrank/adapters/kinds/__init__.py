"""The kinds of adapters: linear layers (`linear.py`), embeddings, convolutions, DoRA, fused experts, and unknown layers.

Embeddings: ΔW = s·B·A [width, vocabulary], of which a token takes one column. B starts from the initial draw, A at zero.

Convolutions: ΔW = s·B·A as the matrix [out, in × kernel] that PEFT's kernels imply. PEFT adapts a convolution by two: A has
the same kernel, stride and padding and r output channels, and B has a kernel of size one. The composition has the kernel
s·Σᵣ B[o, r]·A[r, i, …], so its norm and its best approximation of a lower rank are those of the matrix. Grouped
convolutions are not supported: PEFT's B then sees only some of the r channels.

DoRA (Liu et al. 2024): W = m · (W₀ + s·B·A) / ‖W₀ + s·B·A‖, with a trained magnitude m for each row of W. The direction
is a low-rank update of one of the other kinds, in whose layout A and B are stored. PEFT initializes the magnitudes to ‖W₀‖, so that an
untrained adapter changes nothing. The norm of a row depends on the adapter, and the backward pass treats it as a constant, as PEFT does.

Fused experts: a parameter [experts, …] of a mixture that PEFT adapts through `target_parameters`, with one ΔW for each expert.

PEFT wraps the module that holds the parameter, and the wrapper of a second parameter of that module wraps the first. In a
file, `experts.base_layer` is the parameter that the module registered first, and `experts` the last one. For E experts A is stored as
[E·r, in], the r rows of one expert after those of another, and B as [out, r·E], in which the E columns of one direction
are neighbours. The adapter is added to the parameter before the layer runs, so one pass holds one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from rightrank.adapters.kinds.base import AdapterKind, Factors, InitialDraw, Layout, StoredPair
from rightrank.adapters.kinds.linear import Linear

CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
MAGNITUDE_KEYS = (
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
)  # suffixes of the module's name in PEFT's files


class _Embedding(AdapterKind):
    """A `torch.nn.Embedding`. A and B have the names of a linear layer's factors, with their roles swapped."""

    name = "embedding"
    label = "an embedding"
    unshared_reason = "only PEFT's own forward pass computes it"

    def can_adapt(self, module: Any) -> bool:
        return isinstance(module.base_layer, torch.nn.Embedding) and not module.lora_variant

    def initialize(self, module: Any, adapter: str, draw: InitialDraw) -> None:
        b = module.lora_embedding_B[adapter]
        module.lora_embedding_A[adapter].zero_()
        b.copy_(draw.draw_normal(b.shape[1], b.shape[0]).T.to(b))

    def can_store(self, pair: StoredPair) -> bool:
        return pair.is_embedding


class _Convolution(AdapterKind):
    """A `Conv1d`, `Conv2d` or `Conv3d` without groups."""

    name = "convolution"
    label = "a convolution"
    unshared_reason = "only PEFT's own forward pass computes it"
    unselectable_reason = "select trains text models; select_rank_with trains convolutions"

    def can_adapt(self, module: Any) -> bool:
        return isinstance(module.get_base_layer(), CONVOLUTIONS) and not module.lora_variant

    def get_shapes(self, module: Any) -> list[tuple[str, int, int]]:
        layer = module.get_base_layer()
        return [("", int(layer.out_channels), int(layer.in_channels) * math.prod(layer.kernel_size))]

    def can_store(self, pair: StoredPair) -> bool:
        return not pair.is_embedding and len(pair.a) > 2

    def build_layout(self, pair: StoredPair, rank: int) -> Layout | None:
        return super().build_layout(pair, rank) if len(pair.b) == len(pair.a) else None


class _Dora(AdapterKind):
    """DoRA on a linear layer, an embedding or a convolution."""

    name = "linear"
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

    name = "linear"
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


WRAPPER_SUFFIX = ".base_layer"  # PEFT's suffix for each nested wrapper
LAST_PARAMETERS = ("down", "w2", "output")  # names of parameters that modules register last


class _Experts(AdapterKind):
    """Fused experts, which PEFT adapts through a `ParamWrapper`."""

    name = "expert"
    label = "adapters on fused experts (target_parameters)"
    unshared_reason = "an expert's rows come from any example"

    def can_adapt(self, module: Any) -> bool:
        return type(module).__name__ == "ParamWrapper" and not module.lora_variant

    def get_shapes(self, module: Any) -> list[tuple[str, int, int]]:
        rows, columns = int(module.out_features), int(module.in_features)
        return [(name, rows, columns) for name in _name_experts(module.parameter_name, int(module.num_experts))]

    def initialize(self, module: Any, adapter: str, draw: InitialDraw) -> None:
        a, experts = module.lora_A[adapter].weight, int(module.num_experts)
        rank = a.shape[0] // experts
        drawn = [draw.draw_rows(rank, a.shape[1], expert) for expert in range(experts)]
        a.copy_(torch.cat(drawn).to(a))
        module.lora_B[adapter].weight.zero_()

    def can_store(self, pair: StoredPair) -> bool:
        return not pair.is_embedding and len(pair.a) == 2 and bool(_find_target_parameters(pair))

    def get_address(self, pair: StoredPair) -> str:
        """Return the name of the parameter in the base model, which depends on the depth of the wrapper."""
        parameters = sorted(
            _find_target_parameters(pair), key=lambda name: any(last_name in name for last_name in LAST_PARAMETERS)
        )
        depth = pair.module.count(WRAPPER_SUFFIX)
        parameter = parameters[max(0, len(parameters) - 1 - depth)]
        return f"{pair.module.replace(WRAPPER_SUFFIX, '')}.{parameter}"

    def build_layout(self, pair: StoredPair, rank: int) -> Layout | None:
        if rank < 1 or pair.b[1] != pair.a[0] or pair.a[0] % rank:
            return None
        names = _name_experts(self.get_address(pair), pair.a[0] // rank)
        return Layout(rank, pair.b[0], pair.a[1], tuple(names))

    def unpack_factors(self, a: torch.Tensor, b: torch.Tensor, rank: int) -> list[Factors]:
        experts = a.shape[0] // rank
        by_expert = b.reshape(b.shape[0], rank, experts)
        return [(by_expert[:, :, expert], a[expert * rank : (expert + 1) * rank]) for expert in range(experts)]

    def pack_factors(
        self, factors: Sequence[Factors], a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new_b = torch.stack([one_b for one_b, _ in factors], dim=2)
        return torch.cat([one_a for _, one_a in factors]), new_b.reshape(b.shape[0], -1)


def _name_experts(parameter: str, experts: int) -> list[str]:
    return [parameter] if experts == 1 else [f"{parameter}.{expert}" for expert in range(experts)]


def _find_target_parameters(pair: StoredPair) -> list[str]:
    """Return the names of the `target_parameters` within the pair's module."""
    module = f".{pair.module.replace(WRAPPER_SUFFIX, '')}"
    targets = [str(target).rpartition(".") for target in pair.config.get("target_parameters") or ()]
    return [parameter for path, _, parameter in targets if path and module.endswith(f".{path}")]


KINDS: tuple[AdapterKind, ...] = (_Experts(), _Dora(), _Embedding(), _Convolution(), Linear(), _UnknownKind())
"""All kinds. The first one that claims a module or a pair describes it; the last one claims any module."""


def find_lora_modules(peft_model: Any) -> dict[str, Any]:
    """Return the adapted modules by their names in the base model."""
    from peft.tuners.lora import LoraLayer  # what reads files needs no PEFT

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


def find_stored_kind(pair: StoredPair) -> AdapterKind | None:
    """Return the kind of a pair in an adapter's file, or None if no kind stores it."""
    return next((kind for kind in KINDS if kind.can_store(pair)), None)
