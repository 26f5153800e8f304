"""The experts of a mixture: which parameters of the base hold them, and the rank of each where it is divided by their number."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rightrank.errors import ModelError, did_you_mean
from rightrank.kinds.experts import expert_rank
from rightrank.maths.scaling import peft_scaling
from rightrank.settings import Scaling

LISTED = r"experts\.\d+\..+"  # matches modules in a ModuleList of experts, as a key of PEFT's patterns


def require_parameters(model: Any, target_parameters: Sequence[str]) -> None:
    """Check that every entry of `target_parameters` matches a parameter that is no module's `weight` alone.

    Raises:
        ModelError: one matches nothing; the message names the parameters with a matrix for each expert.
    """
    names = [name for name, _ in model.named_parameters()]
    for target in target_parameters:
        if not any(_matches(target, name) for name in names):
            known = {".".join(name.rsplit(".", 3)[-3:]) for name, value in model.named_parameters() if value.dim() == 3}
            near = did_you_mean(target, known)
            listed = f"; parameters of experts there are: {', '.join(sorted(known)) or 'none'}"
            raise ModelError(f"target_parameters: no parameter is named {target!r}{near or listed}")


def in_layers(model: Any, target_parameters: Sequence[str], layers: Sequence[int] | None) -> list[str]:
    """`target_parameters` in these layers: full names, since PEFT applies `layers_to_transform` to modules alone."""
    if layers is None or not target_parameters:
        return list(target_parameters)
    kept: list[str] = []
    for name, _ in model.named_parameters():
        layer = re.match(r".*?\.(\d+)\.", name)
        if (
            layer is not None
            and int(layer[1]) in layers
            and any(_matches(target, name) for target in target_parameters)
        ):
            kept.append(name)
    return kept


def expert_counts(model: Any, target_parameters: Sequence[str], target_modules: Sequence[str]) -> dict[str, int]:
    """The number of experts by a key of PEFT's patterns: each of `target_parameters`, and modules in a list of experts.

    Raises:
        ModelError: layers with different numbers of experts under one key.
    """
    counts: dict[str, set[int]] = {}
    for name, value in model.named_parameters():
        for target in target_parameters:
            if _matches(target, name) and value.dim() == 3:
                counts.setdefault(target, set()).add(int(value.shape[0]))
    for name, module in model.named_modules():
        listed = re.search(rf"(?:^|\.)(?={LISTED}$)", name)
        if listed is not None and any(_matches(target, name) for target in target_modules) and _is_linear(module):
            counts.setdefault(LISTED, set()).add(len(model.get_submodule(f"{name[: listed.end()]}experts")))
    for key, found in counts.items():
        if len(found) > 1:
            raise ModelError(f"divide_rank_by_experts: layers have {sorted(found)} experts under {key!r}; leave it out")
    return {key: found.pop() for key, found in counts.items()}


def expert_patterns(
    counts: Mapping[str, int], rank: int, lora_alpha: float, scaling: Scaling
) -> tuple[dict[str, int], dict[str, float]]:
    """PEFT's `rank_pattern`, and the `alpha_pattern` that keeps the scaling rule, for experts at `rank` over their number."""
    ranks = {key: expert_rank(rank, count) for key, count in counts.items()}
    whole, _ = peft_scaling(scaling, lora_alpha, rank)
    alphas = {key: peft_scaling(scaling, lora_alpha, one)[0] for key, one in ranks.items()}
    return ranks, {key: alpha for key, alpha in alphas.items() if alpha != whole}


def is_expert(key: str, name: str) -> bool:
    """Whether a key of `expert_counts` matches a matrix by its name in the base."""
    if key == LISTED:
        return re.search(rf"(^|\.){LISTED}$", name) is not None
    return re.sub(r"\.\d+$", "", name).endswith(key)


def _matches(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _is_linear(module: Any) -> bool:
    return hasattr(module, "in_features") or hasattr(module, "nf")
