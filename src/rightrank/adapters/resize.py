"""An adapter folder at other ranks: new factors, new configuration, and the error of the written tensors.

`resize` chooses one rank for all modules, ranks by energy, or a rank by held-out data (`held_out`).
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

from rightrank.adapters.spectra import energy_rank, factored_distance, factored_singular_values
from rightrank.data.files import creating, replacing_folder, require_absent
from rightrank.models.adapter_folders import CONFIG_FILE, MLX_FILE
from rightrank.models.adapter_reader import AdapterFolder, AdapterModule, mlx_key
from rightrank.models.adapter_writer import write_adapter
from rightrank.models.ranks import equal_scale_alphas, equivalent_rank, exact_pattern, lora_scaling, max_module_rank
from rightrank.models.truncation import Moments, new_tensors, shared_ranks
from rightrank.schema.errors import ModelError, SettingsError
from rightrank.schema.results import ModuleResize, Resized


def write_resized(
    adapter: AdapterFolder,
    out: Path,
    chosen: Mapping[str, int],
    moments: Mapping[str, Moments] | None = None,
    chosen_by: str = "",
) -> Resized:
    """Write `adapter` at the chosen rank of each module to `out`; `chosen_by` is the rule that chose them.

    Modules with moments are truncated by K-FAC, the others by singular values. The error is that of s·B·A, of DoRA too.

    Raises:
        ModelError: NaN weights, or an initialisation that changes the base.
        RunFolderError: `out` exists or cannot be written.
    """
    require_absent(out)
    require_plain_update(adapter)
    tensors = write_truncated(adapter, out, chosen, moments)
    scaling = _scaling(_resized_config(adapter, chosen))
    errors = [
        error for pair in adapter.pairs for error in _distances(adapter, pair, _common(pair, chosen), scaling, tensors)
    ]
    records = [
        ModuleResize(
            name=module.name, from_rank=module.rank, rank=rank, relative_delta_error=error / norm if norm > 0 else 0.0
        )
        for module, rank, error, norm in errors
    ]
    ranks = {record.name: record.rank for record in records}
    total, whole = math.hypot(*(error[2] for error in errors)), math.hypot(*(error[3] for error in errors))
    return Resized(
        rank=ranks[records[0].name] if len(set(ranks.values())) == 1 else None,
        relative_delta_error=total / whole if whole > 0 else 0.0,
        modules=records,
        out=str(out),
        parameters_before=sum(module.parameters for module in adapter.modules),
        parameters_after=sum(ranks[module.name] * (module.rows + module.columns) for module in adapter.modules),
        bytes_before=adapter.weights.stat().st_size,
        bytes_after=(out / adapter.weights.name).stat().st_size,
        chosen_by=chosen_by,
        notes=_notes(adapter, tensors),
    )


def require_plain_update(adapter: AdapterFolder) -> None:
    """Refuse an adapter whose ΔW is not s·B·A alone, or is zero whatever B·A.

    Raises:
        ModelError: the initialisation changes the base on loading, or `lora_alpha` is 0.
    """
    if not adapter.config["lora_alpha"]:
        raise ModelError(
            f"{adapter.path}: lora_alpha is 0, so that the adapter changes nothing; verl's merger writes 0 where it does not know it: "
            f"set it in {CONFIG_FILE}"
        )
    if (init := adapter.base_changing_init) is not None:
        raise ModelError(
            f"{adapter.path}: init_lora_weights is {init!r}, which changes the base on loading, by an amount that depends on "
            "the rank; convert it first: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _resized_config(adapter: AdapterFolder, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The configuration at these ranks: every module has the scale of `lora_alpha`, which does not change, at rank `r`.

    Where the modules differ, `r` is the uniform rank of as many parameters, so far as a server that reserves slots for it has room for the
    largest module; else the largest rank.
    """
    by_address = {pair[0].address: _common(pair, ranks) for pair in adapter.pairs}
    largest, sizes = max(by_address.values()), [pair[0].rows + pair[0].columns for pair in adapter.pairs]
    r = equivalent_rank(by_address.values(), sizes)
    r = r if max_module_rank(r) >= largest else largest
    alpha = adapter.config["lora_alpha"]
    return dict(adapter.config) | {
        "r": r,
        "rank_pattern": exact_pattern(by_address, r, by_address),
        "alpha_pattern": exact_pattern(equal_scale_alphas(by_address, r, alpha, adapter.use_rslora), alpha, by_address),
        "init_lora_weights": True,  # loading replaces the first values, and other names of PEFT do not take every rank
        "eva_config": None,
    }


def _scaling(config: Mapping[str, Any]) -> float:
    return lora_scaling(config["lora_alpha"], config["r"], bool(config.get("use_rslora")))


def _common(pair: Sequence[AdapterModule], ranks: Mapping[str, int]) -> int:
    """The rank of the matrices of a pair: the largest of any, since they share tensors."""
    return max(ranks[module.name] for module in pair)


def write_truncated(
    adapter: AdapterFolder, out: Path, chosen: Mapping[str, int], moments: Mapping[str, Moments] | None = None
) -> dict[str, torch.Tensor]:
    """As `write_resized`, without the error of what is written: most of the time of a large adapter."""
    tensors = {key: adapter.tensor(key) for key in adapter.other_keys}
    config = _resized_config(adapter, chosen)
    for pair in adapter.pairs:
        ratio = pair[0].scaling / _scaling(config)
        tensors |= new_tensors(adapter, pair, _common(pair, chosen), ratio, moments or {})
    write_like(adapter, out, config, tensors)
    return tensors


def write_uniform(adapter: AdapterFolder, out: Path) -> None:
    """Write the same function with one rank for all modules, the largest: further directions are zero.

    Where every module has the scale of `lora_alpha` and `r`, no value of a factor changes.

    Raises:
        ModelError: an initialisation that changes the base, or `lora_alpha` is 0.
        RunFolderError: `out` exists or cannot be written.
    """
    require_plain_update(adapter)
    config, largest = adapter.config, adapter.rank
    (alpha,) = equal_scale_alphas({"": largest}, config["r"], config["lora_alpha"], adapter.use_rslora).values()
    widened = replace(adapter, config=dict(config) | {"lora_alpha": alpha})
    write_truncated(widened, out, {module.name: largest for module in adapter.modules})


def _distances(
    adapter: AdapterFolder,
    pair: Sequence[AdapterModule],
    rank: int,
    scaling: float,
    tensors: Mapping[str, torch.Tensor],
) -> Iterator[tuple[AdapterModule, int, float, float]]:
    """`(module, its new rank, ‖ΔW' − ΔW‖_F after rounding to the dtype of the file, ‖ΔW‖_F)` of each matrix of a pair."""
    first = pair[0]
    written = first.kind.matrices(tensors[first.a_key].double(), tensors[first.b_key].double(), rank)
    for module, (new_b, new_a), (b, a) in zip(pair, written, adapter.pair_factors(first), strict=True):
        before, after = (b * module.scaling, a), (new_b.numpy() * scaling, new_a.numpy())
        none = np.zeros((module.rows, 0)), np.zeros((0, module.columns))
        yield module, rank, factored_distance(*before, *after), factored_distance(*before, *none)


def _notes(adapter: AdapterFolder, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    notes: list[str] = []
    if adapter.unused_patterns:
        notes.append(f"patterns that match no module were left out: {', '.join(adapter.unused_patterns)}")
    if adapter.use_dora:
        notes.append("DoRA: the magnitudes are kept; the error is that of s·B·A")
    kept = [tensors[key].numel() for key in adapter.other_keys if not key.endswith(".alpha")]
    if kept:
        notes.append(f"kept as they are: {len(kept)} tensors trained whole, {sum(kept):,} parameters")
    return notes


def capped(adapter: AdapterFolder, rank: int, moments: Mapping[str, Moments] | None = None) -> dict[str, int]:
    """This rank for every module with a higher one; the others keep theirs.

    With moments of every module, the parameters of this rank are distributed over the modules as in a selection, up to
    the rank that a server reserves.
    """
    highest = max_module_rank(rank) if adapter.mlx is None else rank  # mlx-lm loads one rank for all modules
    shared = shared_ranks(adapter, rank, highest, moments or {})
    return {module.name: min(rank, module.rank) for module in adapter.modules} if shared is None else shared


def by_rank(adapter: AdapterFolder, rank: int) -> dict[str, int]:
    """One rank for all modules.

    Raises:
        SettingsError: below 1, or above the limit of a module's ΔW.
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


def by_energy(adapter: AdapterFolder, fraction: float, uniform: bool) -> dict[str, int]:
    """The fewest singular values of each module with this fraction of its energy Σσ²; `uniform`: the most that any needs.

    Raises:
        SettingsError: `fraction` is not above 0 and up to 1.
    """
    if not 0 < fraction <= 1:
        raise SettingsError(f"--energy {fraction:g} is not allowed: give a fraction above 0 and up to 1, such as 0.99")
    ranks: dict[str, int] = {}
    for module in adapter.modules:
        s = factored_singular_values(*adapter.factors(module))
        ranks[module.name] = max(1, energy_rank(s, fraction) or module.rank)
    return dict.fromkeys(ranks, max(ranks.values())) if uniform else ranks


def candidate_ranks(adapter: AdapterFolder, asked: Sequence[int] | None = None) -> list[int]:
    """The ranks to measure: `asked`, or every power of two below the adapter's largest rank; and that rank.

    Raises:
        SettingsError: a rank above the adapter's.
    """
    top = adapter.rank
    if top == 1:
        raise SettingsError(
            f"{adapter.path}: its rank is 1, and there is no lower rank to measure; give an adapter of a higher rank"
        )
    if asked:
        for rank in asked:
            if not 1 <= rank <= top:
                raise SettingsError(f"rank {rank} cannot be reached by truncation; give ranks from 1 to {top}")
        return sorted({*asked, top})
    return sorted({2**power for power in range(top.bit_length()) if 2**power < top} | {top})


def write_like(
    adapter: AdapterFolder,
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a changed adapter in the format of `adapter`: a folder of PEFT or mlx-lm.

    PEFT's keeps what lies beside it, and gets further `files`.

    Raises:
        RunFolderError: `out` exists, or can't be written.
    """
    if adapter.mlx is not None:
        _write_mlx(out, adapter.mlx, config, tensors)
        return
    write_adapter(out, config, tensors, adapter.path, files)


def _write_mlx(
    out: Path, stored: Mapping[str, Any], config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a folder that mlx-lm loads, whole or not at all: `stored` at the rank of `config`, and PEFT's tensors.

    Raises:
        ModelError: modules of several ranks.
        RunFolderError: `out` exists, or can't be written.
    """
    if config["rank_pattern"] or config["alpha_pattern"]:
        raise ModelError("mlx-lm loads one rank for all modules: add --uniform, or give one rank")
    parameters = dict(stored["lora_parameters"]) | {"rank": config["r"], "scale": config["lora_alpha"] / config["r"]}
    with creating(out), replacing_folder(out) as temporary:
        named = {mlx_key(key): value.T.contiguous() for key, value in tensors.items()}
        save_file(named, temporary / MLX_FILE, {"format": "mlx"})
        text = json.dumps(dict(stored) | {"lora_parameters": parameters}, indent=4, sort_keys=True) + "\n"
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
