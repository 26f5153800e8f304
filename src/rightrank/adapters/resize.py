"""Change the ranks of an adapter folder: new factors, a new configuration, and the error of the written tensors.

`resize` chooses one rank for all modules, ranks by energy, or a rank by held-out data (`resize_by_data`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from rightrank.adapters.spectra import compute_distance, compute_energy_rank, compute_singular_values
from rightrank.data.files import create_output, replace_folder, require_absent
from rightrank.models.adapter_folders import CONFIG_FILE, MLX_FILE
from rightrank.models.adapter_reader import AdapterFolder, AdapterModule, convert_to_mlx_key
from rightrank.models.adapter_writer import write_adapter
from rightrank.models.ranks import (
    build_exact_pattern,
    compute_equal_scale_alphas,
    compute_equivalent_rank,
    compute_scaling,
    find_server_rank,
)
from rightrank.models.truncation import Moments, allocate_module_ranks, resize_pair
from rightrank.schema.errors import ModelError, SettingsError
from rightrank.schema.results import ModuleResize, Resized


def resize_adapter(
    adapter: AdapterFolder,
    out: Path,
    ranks: Mapping[str, int],
    moments: Mapping[str, Moments] | None = None,
    rule: str = "",
) -> Resized:
    """Write `adapter` to `out` at the chosen rank of each module, and measure the error of the written tensors.

    Modules with moments are truncated by K-FAC, the others by singular values. The error is that of s·B·A, also for DoRA.

    Args:
        rule: The rule that chose the ranks, for the record.

    Raises:
        ModelError: The weights contain NaN, or the initialization changes the base model.
        RunFolderError: `out` exists or cannot be written.
    """
    require_absent(out)
    require_plain_update(adapter)
    tensors = write_resized_adapter(adapter, out, ranks, moments)
    scaling = _compute_scaling(_build_resized_config(adapter, ranks))
    errors = [
        error
        for pair in adapter.pairs
        for error in _measure_errors(adapter, pair, _find_pair_rank(pair, ranks), scaling, tensors)
    ]
    records = [
        ModuleResize(
            name=module.name, from_rank=module.rank, rank=rank, relative_delta_error=error / norm if norm > 0 else 0.0
        )
        for module, rank, error, norm in errors
    ]
    new_ranks = {record.name: record.rank for record in records}
    total_error, total_norm = math.hypot(*(error[2] for error in errors)), math.hypot(*(error[3] for error in errors))
    return Resized(
        rank=new_ranks[records[0].name] if len(set(new_ranks.values())) == 1 else None,
        relative_delta_error=total_error / total_norm if total_norm > 0 else 0.0,
        modules=records,
        out=str(out),
        parameters_before=sum(module.parameters for module in adapter.modules),
        parameters_after=sum(new_ranks[module.name] * (module.rows + module.columns) for module in adapter.modules),
        bytes_before=adapter.weights_file.stat().st_size,
        bytes_after=(out / adapter.weights_file.name).stat().st_size,
        chosen_by=rule,
        notes=_build_notes(adapter, tensors),
    )


def require_plain_update(adapter: AdapterFolder) -> None:
    """Raise if the adapter's ΔW is not s·B·A alone, or is always zero.

    Raises:
        ModelError: The initialization changes the base model on loading, or `lora_alpha` is 0.
    """
    if not adapter.config["lora_alpha"]:
        raise ModelError(
            f"{adapter.path}: lora_alpha is 0, so the adapter has no effect; verl's merger writes 0 if it does not know the value: "
            f"set it in {CONFIG_FILE}"
        )
    if (init := adapter.base_changing_init) is not None:
        raise ModelError(
            f"{adapter.path}: init_lora_weights is {init!r}, which changes the base model on loading by an amount that depends on "
            "the rank; convert it first: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _build_resized_config(adapter: AdapterFolder, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Build the configuration at these ranks: every module keeps the scale of `lora_alpha` at rank `r`, and `lora_alpha` does not change.

    If the modules differ, `r` is the uniform rank with as many parameters, provided that a server that reserves slots for it has room for the
    largest module; else it is the largest rank.
    """
    by_address = {pair[0].address: _find_pair_rank(pair, ranks) for pair in adapter.pairs}
    largest, sizes = max(by_address.values()), [pair[0].rows + pair[0].columns for pair in adapter.pairs]
    r = compute_equivalent_rank(by_address.values(), sizes)
    r = r if find_server_rank(r) >= largest else largest
    alpha = adapter.config["lora_alpha"]
    return dict(adapter.config) | {
        "r": r,
        "rank_pattern": build_exact_pattern(by_address, r, by_address),
        "alpha_pattern": build_exact_pattern(
            compute_equal_scale_alphas(by_address, r, alpha, adapter.use_rslora), alpha, by_address
        ),
        "init_lora_weights": True,  # loading replaces the first values, and other names of PEFT do not take every rank
        "eva_config": None,
    }


def _compute_scaling(config: Mapping[str, Any]) -> float:
    return compute_scaling(config["lora_alpha"], config["r"], bool(config.get("use_rslora")))


def _find_pair_rank(pair: Sequence[AdapterModule], ranks: Mapping[str, int]) -> int:
    """Return the rank of the matrices of a pair: the largest of any, because they share tensors."""
    return max(ranks[module.name] for module in pair)


def write_resized_adapter(
    adapter: AdapterFolder, out: Path, ranks: Mapping[str, int], moments: Mapping[str, Moments] | None = None
) -> dict[str, torch.Tensor]:
    """Write the adapter as `resize_adapter` does, without measuring the error, which takes most of the time for a large adapter."""
    tensors = {key: adapter.load_tensor(key) for key in adapter.other_keys}
    config = _build_resized_config(adapter, ranks)
    for pair in adapter.pairs:
        ratio = pair[0].scaling / _compute_scaling(config)
        tensors |= resize_pair(adapter, pair, _find_pair_rank(pair, ranks), ratio, moments or {})
    write_same_format(adapter, out, config, tensors)
    return tensors


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


def _measure_errors(
    adapter: AdapterFolder,
    pair: Sequence[AdapterModule],
    rank: int,
    scaling: float,
    tensors: Mapping[str, torch.Tensor],
) -> Iterator[tuple[AdapterModule, int, float, float]]:
    """Yield `(module, new rank, ‖ΔW' − ΔW‖_F, ‖ΔW‖_F)` of each matrix of a pair, after rounding to the dtype of the file."""
    first = pair[0]
    written = first.kind.unpack_factors(tensors[first.a_key].double(), tensors[first.b_key].double(), rank)
    for module, (new_b, new_a), (b, a) in zip(pair, written, adapter.load_pair_factors(first), strict=True):
        old_factors, new_factors = (b * module.scaling, a), (new_b.numpy() * scaling, new_a.numpy())
        zero_factors = np.zeros((module.rows, 0)), np.zeros((0, module.columns))
        yield module, rank, compute_distance(*old_factors, *new_factors), compute_distance(*old_factors, *zero_factors)


def _build_notes(adapter: AdapterFolder, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    notes: list[str] = []
    if adapter.unused_patterns:
        notes.append(f"patterns that match no module were left out: {', '.join(adapter.unused_patterns)}")
    if adapter.use_dora:
        notes.append("DoRA: the magnitudes are kept; the error is that of s·B·A")
    saved_sizes = [tensors[key].numel() for key in adapter.other_keys if not key.endswith(".alpha")]
    if saved_sizes:
        notes.append(f"unchanged: {len(saved_sizes)} fully trained tensors with {sum(saved_sizes):,} parameters")
    return notes


def cap_ranks(adapter: AdapterFolder, rank: int, moments: Mapping[str, Moments] | None = None) -> dict[str, int]:
    """Return this rank for every module with a higher one, and the module's own rank for the others.

    With moments of every module, the parameters of this rank are allocated to the modules as in a selection, up to
    the rank that a server reserves.
    """
    highest = find_server_rank(rank) if adapter.mlx_config is None else rank  # mlx-lm loads one rank for all modules
    allocated = allocate_module_ranks(adapter, rank, highest, moments or {})
    return {module.name: min(rank, module.rank) for module in adapter.modules} if allocated is None else allocated


def choose_uniform_rank(adapter: AdapterFolder, rank: int) -> dict[str, int]:
    """Return one rank for all modules.

    Raises:
        SettingsError: The rank is below 1 or above the limit of a module's ΔW.
    """
    if rank < 1:
        raise SettingsError(f"--rank {rank} is not allowed: give a whole number from 1")
    for module in adapter.modules:
        if rank > max(module.rank, min(module.rows, module.columns)):
            raise SettingsError(
                f"--rank {rank} is above the {min(module.rows, module.columns)} that {module.name} "
                f"({module.rows} × {module.columns}) can have; give a lower rank"
            )
    return {module.name: rank for module in adapter.modules}


def choose_ranks_by_energy(adapter: AdapterFolder, fraction: float, uniform: bool) -> dict[str, int]:
    """Return the smallest rank of each module with this fraction of its energy Σσ²; with `uniform`, the largest of them for all modules.

    Raises:
        SettingsError: `fraction` is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise SettingsError(f"--energy {fraction:g} is not allowed: give a fraction above 0 and up to 1, such as 0.99")
    ranks: dict[str, int] = {}
    for module in adapter.modules:
        s = compute_singular_values(*adapter.load_factors(module))
        ranks[module.name] = max(1, compute_energy_rank(s, fraction) or module.rank)
    return dict.fromkeys(ranks, max(ranks.values())) if uniform else ranks


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


def write_same_format(
    adapter: AdapterFolder,
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a changed adapter in the format of `adapter`, which is that of PEFT or mlx-lm.

    In PEFT's format, the accompanying files are copied and additional `files` are written.

    Raises:
        RunFolderError: `out` exists or can't be written.
    """
    if adapter.mlx_config is not None:
        _write_mlx_adapter(out, adapter.mlx_config, config, tensors)
        return
    write_adapter(out, config, tensors, adapter.path, files)


def _write_mlx_adapter(
    out: Path, stored: Mapping[str, Any], config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a folder that mlx-lm loads: `stored` at the rank of `config`, and PEFT's tensors. An error leaves no folder behind.

    Raises:
        ModelError: The modules have different ranks.
        RunFolderError: `out` exists or can't be written.
    """
    if config["rank_pattern"] or config["alpha_pattern"]:
        raise ModelError("mlx-lm loads one rank for all modules: add --uniform, or give one rank")
    parameters = dict(stored["lora_parameters"]) | {"rank": config["r"], "scale": config["lora_alpha"] / config["r"]}
    with create_output(out), replace_folder(out) as temporary:
        named = {convert_to_mlx_key(key): value.T.contiguous() for key, value in tensors.items()}
        save_file(named, temporary / MLX_FILE, {"format": "mlx"})
        text = json.dumps(dict(stored) | {"lora_parameters": parameters}, indent=4, sort_keys=True) + "\n"
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
