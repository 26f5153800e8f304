"""Write an adapter folder at other ranks: new factors and a configuration that gives every module its scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rightrank.adapters.adapter_folders import CONFIG_FILE, require_kept_base
from rightrank.adapters.adapter_reader import AdapterFolder, AdapterModule, open_adapter
from rightrank.adapters.adapter_writer import write_same_format
from rightrank.adapters.rank_math import (
    build_exact_pattern,
    compute_equal_scale_alphas,
    compute_equivalent_rank,
    compute_scaling,
    find_server_rank,
)
from rightrank.adapters.truncation import Moments, allocate_module_ranks, resize_pair
from rightrank.schema.errors import ModelError, SettingsError


def require_plain_update(adapter: AdapterFolder) -> None:
    """Raise if the adapter's ΔW is not s·B·A alone, or is always zero.

    Raises:
        ModelError: The initialization may change the base model on loading, or `lora_alpha` is 0.
    """
    if not adapter.config["lora_alpha"]:
        raise ModelError(
            f"{adapter.path}: lora_alpha is 0, so the adapter has no effect; verl's merger writes 0 if it does not know the value: "
            f"set it in {CONFIG_FILE}"
        )
    require_kept_base(adapter.path, adapter.config)


def cap_ranks(adapter: AdapterFolder, rank: int, moments: Mapping[str, Moments] | None = None) -> dict[str, int]:
    """Return this rank for every module with a higher one, and the module's own rank for the others.

    With moments of every module, the parameters of this rank are allocated to the modules as in a selection, up to
    the rank that a server reserves.
    """
    highest = find_server_rank(rank) if adapter.foreign is None else rank  # mlx-lm loads one rank for all modules
    allocated = allocate_module_ranks(adapter, rank, highest, moments or {})
    return {module.name: min(rank, module.rank) for module in adapter.modules} if allocated is None else allocated


def write_resized_adapter(
    adapter: AdapterFolder, out: Path, ranks: Mapping[str, int], moments: Mapping[str, Moments] | None = None
) -> dict[str, torch.Tensor]:
    """Write the adapter as `resize_adapter` does, without measuring the error, which takes most of the time for a large adapter."""
    tensors = {key: adapter.load_tensor(key) for key in adapter.other_keys}
    config = build_resized_config(adapter, ranks)
    for pair in adapter.pairs:
        ratio = pair[0].scaling / compute_config_scaling(config)
        tensors |= resize_pair(adapter, pair, find_pair_rank(pair, ranks), ratio, moments or {})
    write_same_format(adapter, out, config, tensors)
    return tensors


@dataclass(frozen=True, slots=True)
class RankedAdapter:
    """An adapter folder at a rank: that of a uniform adapter with as many parameters."""

    rank: int
    folder: AdapterFolder


def write_truncation(
    adapter: AdapterFolder, out: Path, rank: int, moments: Mapping[str, Moments] | None = None
) -> RankedAdapter:
    """Truncate an adapter to `rank` as a selection does, and write it."""
    write_resized_adapter(adapter, out, cap_ranks(adapter, rank, moments), moments)
    return RankedAdapter(rank, open_adapter(out))


def write_uniform_adapter(adapter: AdapterFolder, out: Path) -> None:
    """Write the same function with the largest rank in all modules; the additional directions are zero.

    If every module has the scale of `lora_alpha` and `r`, no value of a factor changes.

    Raises:
        ModelError: The initialization changes the base model, or `lora_alpha` is 0.
        RunFolderError: `out` exists or cannot be written.
    """
    require_plain_update(adapter)
    config, largest = adapter.config, adapter.rank
    (alpha,) = compute_equal_scale_alphas({"": largest}, config["r"], config["lora_alpha"], adapter.use_rslora).values()
    widened = replace(adapter, config=dict(config) | {"lora_alpha": alpha})
    write_resized_adapter(widened, out, {module.name: largest for module in adapter.modules})


def build_resized_config(adapter: AdapterFolder, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Build the configuration at these ranks: every module keeps the scale of `lora_alpha` at rank `r`.

    `lora_alpha` does not change. Where PEFT did not write the adapter, the scale does not change.

    If the modules differ, `r` is the uniform rank with as many parameters, provided that a server that reserves slots for it has room for the
    largest module; else it is the largest rank.
    """
    by_address = {pair[0].address: find_pair_rank(pair, ranks) for pair in adapter.pairs}
    largest, sizes = max(by_address.values()), [pair[0].rows + pair[0].columns for pair in adapter.pairs]
    r = compute_equivalent_rank(by_address.values(), sizes)
    r = r if find_server_rank(r) >= largest else largest
    alpha = adapter.config["lora_alpha"] * (1 if adapter.foreign is None else r / adapter.config["r"])
    alphas = compute_equal_scale_alphas(by_address, r, alpha, adapter.use_rslora)
    return dict(adapter.config) | {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": build_exact_pattern(by_address, r, by_address),
        "alpha_pattern": build_exact_pattern(alphas, alpha, by_address),
        "init_lora_weights": True,  # loading replaces the first values, and other names of PEFT do not take every rank
        "eva_config": None,
    }


def compute_config_scaling(config: Mapping[str, Any]) -> float:
    return compute_scaling(config["lora_alpha"], config["r"], bool(config.get("use_rslora")))


def find_pair_rank(pair: Sequence[AdapterModule], ranks: Mapping[str, int]) -> int:
    """Return the rank of the matrices of a pair: the largest of any, because they share tensors."""
    return max(ranks[module.name] for module in pair)


def list_candidate_ranks(adapter: AdapterFolder, requested: Sequence[int] | None = None) -> list[int]:
    """Return the ranks to measure: the requested ones, or every power of two below the adapter's largest rank, and that rank.

    Raises:
        SettingsError: A rank is above the adapter's, or the adapter has rank 1.
    """
    top = adapter.rank
    if top == 1:
        raise SettingsError(
            f"{adapter.path}: its rank is 1, and there is no lower rank to measure; give an adapter of a higher rank"
        )
    if requested:
        for rank in requested:
            if not 1 <= rank <= top:
                raise SettingsError(f"rank {rank} cannot be reached by truncation; give ranks from 1 to {top}")
        return sorted({*requested, top})
    return sorted({2**power for power in range(top.bit_length()) if 2**power < top} | {top})
