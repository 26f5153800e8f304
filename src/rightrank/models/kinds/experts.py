"""Fused experts: a parameter [experts, …] of a mixture that PEFT adapts through `target_parameters`, a ΔW for each expert.

PEFT wraps the module that holds the parameter, and the wrapper of a second parameter of that module wraps the first: in a
file, `experts.base_layer` is the parameter that the module registered first, `experts` the last. For E experts A is stored as
[E·r, in], the r rows of one expert after those of another, and B as [out, r·E], in which the E columns of one direction
are neighbours. The adapter is added to the parameter before the layer runs, so that one pass holds one adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rightrank.models.kinds.base import AdapterKind, Draw, Factors, Layout, StoredPair

WRAPPED = ".base_layer"  # PEFT's suffix for each wrapper inside another
LAST_IN_A_LAYER = ("down", "w2", "output")  # in the names of parameters that modules register last


class Experts(AdapterKind):
    """PEFT's `ParamWrapper`."""

    name = "expert"
    label = "adapters on fused experts (target_parameters)"
    why_alone = "an expert's rows come from any example"
    why_own_start = "an expert's inputs are a choice of tokens"
    why_not_padded = "servers load experts in formats of their own"

    def adapts(self, module: Any) -> bool:
        return type(module).__name__ == "ParamWrapper" and not module.lora_variant

    def shapes(self, module: Any) -> list[tuple[str, int, int]]:
        rows, columns = int(module.out_features), int(module.in_features)
        return [(name, rows, columns) for name in _names(module.parameter_name, int(module.num_experts))]

    def start(self, module: Any, adapter: str, draw: Draw) -> None:
        a, experts = module.lora_A[adapter].weight, int(module.num_experts)
        rank = a.shape[0] // experts
        drawn = [draw.rows(rank, a.shape[1], expert) for expert in range(experts)]
        a.copy_(torch.cat(drawn).to(a))
        module.lora_B[adapter].weight.zero_()

    def stores(self, pair: StoredPair) -> bool:
        return not pair.embedding and len(pair.a) == 2 and bool(_parameters(pair))

    def address(self, pair: StoredPair) -> str:
        """The parameter's name in the base: that of the wrapper at this depth."""
        parameters = sorted(_parameters(pair), key=lambda name: any(part in name for part in LAST_IN_A_LAYER))
        depth = pair.module.count(WRAPPED)
        parameter = parameters[max(0, len(parameters) - 1 - depth)]
        return f"{pair.module.replace(WRAPPED, '')}.{parameter}"

    def layout(self, pair: StoredPair, rank: int) -> Layout | None:
        if rank < 1 or pair.b[1] != pair.a[0] or pair.a[0] % rank:
            return None
        names = _names(self.address(pair), pair.a[0] // rank)
        return Layout(rank, pair.b[0], pair.a[1], tuple(names))

    def matrices(self, a: torch.Tensor, b: torch.Tensor, rank: int) -> list[Factors]:
        experts = a.shape[0] // rank
        by_expert = b.reshape(b.shape[0], rank, experts)
        return [(by_expert[:, :, expert], a[expert * rank : (expert + 1) * rank]) for expert in range(experts)]

    def tensors(
        self, factors: Sequence[Factors], a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new_b = torch.stack([one_b for one_b, _ in factors], dim=2)
        return torch.cat([one_a for _, one_a in factors]), new_b.reshape(b.shape[0], -1)


def expert_rank(rank: int, experts: int) -> int:
    """The rank of one expert where a rank is divided by the number of experts (Schulman et al. 2025), at least 1."""
    return max(1, rank // experts)


def _names(parameter: str, experts: int) -> list[str]:
    return [parameter] if experts == 1 else [f"{parameter}.{expert}" for expert in range(experts)]


def _parameters(pair: StoredPair) -> list[str]:
    """The last parts of those `target_parameters` that lie on the pair's module."""
    module = f".{pair.module.replace(WRAPPED, '')}"
    found = [str(target).rpartition(".") for target in pair.config.get("target_parameters") or ()]
    return [parameter for path, _, parameter in found if path and module.endswith(f".{path}")]
