"""The kinds of adapted layers: linear layers, embeddings, DoRA, fused experts, and unknown ones.

PEFT creates every adapter and saves it, and `adapters.adapter_files` describes the saved tensors. A kind is one class and one entry in `KINDS`;
the first one that claims a module describes it. It keeps two promises. `initialize` leaves the function of the base model unchanged,
and an adapter of rank r starts with the first r rows of the draw of a larger one. `forward` computes for the rows of an adapter what
PEFT's forward pass computes for them.

DoRA (Liu et al. 2024): W = m · (W₀ + s·B·A) / ‖W₀ + s·B·A‖, with a trained magnitude m for each row of W. PEFT initializes the
magnitudes to ‖W₀‖, so that an untrained adapter changes nothing. The norm of a row depends on the adapter, and the backward pass treats
it as a constant, as PEFT does.

The adapter of fused experts is added to their parameter before the layer runs, so one pass holds one adapter.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from peft.tuners.lora import LoraLayer

from rightrank.adapters.adapter_files import name_experts
from rightrank.schema.errors import MultiLoraError
from rightrank.training.device import set_training_mode
from rightrank.training.routing import Routing, run_linear_layer


@dataclass(frozen=True, slots=True)
class InitialDraw:
    """The random numbers that an adapter starts from, a function of the arm's seed and the module's name."""

    seed: int
    module: str
    init: str  # the value of `init_lora_weights`

    def draw_rows(self, rank: int, width: int, *index: int) -> torch.Tensor:
        """Draw [rank, width] in float32, uniform in ±1/√width or normal with standard deviation 1/rank.

        Rows are drawn one after the other, so a lower rank gets the first rows. `index` numbers the matrices of a module.
        """
        generator = self._make_generator(*index)
        if self.init == "gaussian":
            return torch.from_numpy(generator.standard_normal((rank, width)) / rank).float()
        bound = 1 / math.sqrt(width)
        return torch.from_numpy(generator.uniform(-bound, bound, (rank, width))).float()

    def draw_normal(self, rank: int, width: int) -> torch.Tensor:
        """Draw [rank, width] in float64 from a standard normal; a lower rank gets the first rows."""
        return torch.from_numpy(self._make_generator().standard_normal((rank, width)))

    def _make_generator(self, *index: int) -> np.random.Generator:
        digest = hashlib.sha256(self.module.encode()).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest[:8], "big"), *index])


class AdapterKind(ABC):
    """One way in which PEFT adapts a layer. The defaults describe s·B·A with matrices A and B."""

    label: ClassVar[str]  # in messages, with its article: "an embedding"
    unshared_reason: ClassVar[str | None] = None  # why two adapters can't share a pass; None if they can
    untruncatable_reason: ClassVar[str | None] = None  # why an adapter can't be truncated to a lower rank

    @abstractmethod
    def can_adapt(self, module: Any) -> bool:
        """Return whether PEFT's layer `module` (a `LoraLayer`) carries adapters of this kind."""

    def get_shapes(self, module: Any) -> list[tuple[str, int, int]]:
        """Return `(suffix of the module's name, rows, columns)` of each matrix ΔW; the suffix is empty for a single one."""
        return [("", int(module.out_features), int(module.in_features))]

    def initialize(self, module: Any, adapter: str, draw: InitialDraw) -> None:
        """Set the adapter's tensors to their initial values."""
        a = module.lora_A[adapter].weight
        a.copy_(draw.draw_rows(a.shape[0], a[0].numel()).view_as(a).to(a))
        module.lora_B[adapter].weight.zero_()

    def forward(self, module: Any, routing: Routing, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass in place of the module's own: each row with the tensors of its adapter.

        The default runs PEFT's own pass with the only adapter of the batch.
        """
        if len(routing.adapters) > 1:
            raise MultiLoraError(f"{self.label} trains alone, through PEFT's own forward pass")
        with _enable_dropout(module, routing.adapters[0], routing.dropout_seeds[0]):
            return type(module).forward(module, *args, **kwargs)


@contextmanager
def _enable_dropout(module: Any, adapter: str, seed: int | None) -> Iterator[None]:
    """Put PEFT's layer in training mode within the block, with dropout drawn from the seed and the layer; do nothing if the seed is None.

    The layers inside keep their mode. Gradient checkpointing computes a layer again and draws the same mask.
    """
    if seed is None:
        yield
        return
    layers = [module]
    if adapter in module.lora_dropout and isinstance(module.lora_dropout[adapter], torch.nn.Dropout):
        layers.append(module.lora_dropout[adapter])
    draws = len(layers) > 1
    with torch.random.fork_rng(enabled=draws):
        if draws:
            torch.manual_seed((seed * 0x9E3779B1 + module.rightrank_salt) % 2**63)
        with set_training_mode(True, [layer for layer in layers if not layer.training]):
            yield


class Linear(AdapterKind):
    """A `torch.nn.Linear`, transformers' `Conv1D`, or a quantised linear layer."""

    label = "a linear layer"

    def can_adapt(self, module: Any) -> bool:
        if module.lora_variant or any(module.lora_bias.values()) or not module.lora_A:
            return False
        if type(module).__name__ in ("ParamWrapper", "MultiheadAttention"):
            return False
        if not all(isinstance(a, torch.nn.Linear) for a in module.lora_A.values()):
            return False
        # A maps the layer's inputs and B its outputs, as PEFT has it for every linear layer and no other.
        a, b = next(iter(module.lora_A.values())), next(iter(module.lora_B.values()))
        return (int(a.in_features), int(b.out_features)) == (int(module.in_features), int(module.out_features))

    def forward(self, module: Any, routing: Routing, *args: Any, **kwargs: Any) -> Any:
        return run_linear_layer(module, routing, *args, **kwargs)


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


class _Dora(AdapterKind):
    """DoRA on a linear layer or an embedding."""

    label = "DoRA"
    unshared_reason = "each adapter has its own norm of every row of the weight"

    def can_adapt(self, module: Any) -> bool:
        variants = [type(variant).__name__ for variant in module.lora_variant.values()]
        return bool(variants) and all(name.startswith("Dora") for name in variants)

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


KINDS: tuple[AdapterKind, ...] = (_Experts(), _Dora(), _Embedding(), Linear(), _UnknownKind())
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
