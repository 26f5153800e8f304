"""The exact sum of adapters: Σ wᵢ sᵢ Bᵢ Aᵢ by concatenation.

B = [w₁s₁B₁ w₂s₂B₂ …] and A stacks A₁, A₂, … with a scale of 1, so ranks add up and nothing is lost. Every adapter's own scale is
folded in, whatever rule, rank pattern or alpha pattern it comes from. Averaging A and B themselves, as some merges
do, is not this sum: (Σ Bᵢ)(Σ Aᵢ) has cross terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rightrank.errors import ModelError
from rightrank.io.adapter_folder import AdapterFolder, AdapterModule
from rightrank.io.adapter_writing import write_adapter
from rightrank.io.patterns import exact_pattern

SUMMABLE = ("linear", "embedding", "convolution")


@dataclass(frozen=True, slots=True)
class _Part:
    adapter: AdapterFolder
    module: AdapterModule
    weight: float


def write_sum(adapters: Sequence[AdapterFolder], weights: Sequence[float], out: Path) -> None:
    """Write Σ wᵢ ΔWᵢ as one adapter.

    Raises:
        ModelError: an adapter whose update is not a sum of s·B·A (DoRA), one with modules trained whole or trained biases of the
            base, or adapters of different kinds of layers.
    """
    require_summable(adapters)
    parts: dict[str, list[_Part]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for module in adapter.modules:
            parts.setdefault(module.name, []).append(_Part(adapter, module, weight))
    with_bias = any(part.module.bias_key for found in parts.values() for part in found)
    tensors: dict[str, torch.Tensor] = {}
    for found in parts.values():
        tensors |= _summed(found, with_bias)
    ranks = {name: sum(part.module.rank for part in found) for name, found in parts.items()}
    write_adapter(out, _config(adapters, ranks, with_bias), tensors)


def require_summable(adapters: Sequence[AdapterFolder]) -> None:
    """Refuse adapters whose sum is not the concatenation of their factors."""
    for adapter in adapters:
        if adapter.use_dora:
            raise ModelError(
                f"{adapter.path}: DoRA normalises the weight, so its update can't be added; merge it into a model"
            )
        if adapter.other_keys:
            raise ModelError(
                f"{adapter.path}: it holds modules or biases that are trained whole ({adapter.other_keys[0]}), which have no sum "
                "of factors; leave it out, or train without modules_to_save and bias"
            )
        foreign = next((one for one in adapter.modules if one.kind not in SUMMABLE), None)
        if foreign is not None:
            raise ModelError(
                f"{adapter.path}: {foreign.name} is of the kind {foreign.kind!r}, of which sums are not made: leave it out"
            )
    kinds: dict[str, tuple[object, ...]] = {}
    for adapter in adapters:
        for module in adapter.modules:
            known = kinds.setdefault(module.name, (module.kind, module.rows, module.columns))
            if known != (module.kind, module.rows, module.columns):
                raise ModelError(
                    f"{adapter.path}: {module.name} is {module.rows} × {module.columns}, in another adapter it is not"
                )


def _summed(parts: Sequence[_Part], with_bias: bool) -> dict[str, torch.Tensor]:
    first = parts[0]
    like_a, like_b = first.adapter.tensor(first.module.a_key), first.adapter.tensor(first.module.b_key)
    dtype = torch.float32 if len({part.adapter.tensor(part.module.b_key).dtype for part in parts}) > 1 else like_b.dtype
    factors = [part.adapter.factors(part.module) for part in parts]
    scaled = [
        torch.from_numpy(b) * (part.weight * part.module.scaling) for (b, _), part in zip(factors, parts, strict=True)
    ]
    b, a = torch.cat(scaled, dim=1), torch.cat([torch.from_numpy(one) for _, one in factors], dim=0)
    rank = b.shape[1]
    tensors = {
        first.module.b_key: b.reshape(like_b.shape[0], rank, *like_b.shape[2:]).to(dtype),
        first.module.a_key: a.reshape(rank, *like_a.shape[1:]).to(dtype),
    }
    if with_bias and first.module.kind != "embedding":
        key = first.module.b_key.removesuffix(".weight") + ".bias"
        bias = torch.zeros(first.module.rows, dtype=torch.float64)
        for part in parts:
            if part.module.bias_key is not None:
                bias += part.adapter.tensor(part.module.bias_key).double() * (part.weight * part.module.scaling)
        tensors[key] = bias.to(dtype)
    return tensors


def _config(adapters: Sequence[AdapterFolder], ranks: dict[str, int], with_bias: bool) -> dict[str, Any]:
    """The configuration of the sum: alpha = r in every module, so that the scale is 1."""
    largest = max(ranks.values())
    config = dict(adapters[0].config)
    layers = [name for name in ("layers_to_transform", "layers_pattern", "exclude_modules") if config.get(name)]
    return (
        config
        | dict.fromkeys(layers)
        | {
            "r": largest,
            "lora_alpha": largest,
            "use_rslora": False,
            "lora_bias": with_bias,
            "bias": "none",
            "target_modules": sorted(ranks),
            "rank_pattern": exact_pattern(ranks, largest, ranks),
            "alpha_pattern": exact_pattern(ranks, largest, ranks),
            "init_lora_weights": True,
        }
    )
