"""Change the ranks of an adapter folder: the ranks, the factors, the configuration that gives every module its scale, and the error of ΔW."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rightrank.adapters.adapter_files import (
    AdapterFolder,
    AdapterModule,
    open_adapter,
    pack_factors,
    unpack_factors,
    write_adapter,
)
from rightrank.adapters.adapter_folders import CONFIG_FILE, require_kept_base
from rightrank.adapters.rank_math import (
    build_exact_pattern,
    compute_equal_scale_alphas,
    compute_equivalent_rank,
    convert_scaling,
    find_server_rank,
)
from rightrank.adapters.truncation import (
    Moments,
    allocate_ranks,
    compute_distance,
    decompose_update,
    resize_factors,
    use_one_thread,
)
from rightrank.bases.safetensors_files import Tensor, narrow, widen
from rightrank.data.files import require_absent
from rightrank.schema.errors import ModelError, SettingsError
from rightrank.schema.results import ModuleResize, Resized


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


def resize_adapter(
    adapter: AdapterFolder,
    out: Path,
    ranks: Mapping[str, int],
    moments: Mapping[str, Moments] | None = None,
    rule: str = "",
) -> Resized:
    """Write `adapter` to `out` at the chosen rank of each module and measure the error of the written tensors.

    Modules with moments are truncated by K-FAC, the others by singular values. The error is that of s·B·A, also for DoRA.

    Args:
        rule: The rule that chose the ranks, for the record.

    Raises:
        ModelError: The weights contain NaN, or the initialization changes the base model.
        RunFolderError: `out` exists or cannot be written.
    """
    require_absent(out)
    require_plain_update(adapter)
    config = _build_resized_config(adapter, ranks)
    scaling = config["lora_alpha"] / config["r"]
    tensors = _resize_tensors(adapter, ranks, scaling, moments or {})
    records: list[ModuleResize] = []
    squared_error = squared_norm = 0.0
    with use_one_thread():
        for pair in adapter.pairs:
            for module, rank, error, norm in _measure_errors(adapter, pair, scaling, tensors):
                share = error / norm if norm > 0 else 0.0
                records.append(
                    ModuleResize(name=module.name, from_rank=module.rank, rank=rank, relative_delta_error=share)
                )
                squared_error, squared_norm = squared_error + error**2, squared_norm + norm**2
    write_adapter(out, config, tensors, adapter)
    new_ranks = {record.name: record.rank for record in records}
    return Resized(
        rank=records[0].rank if len(set(new_ranks.values())) == 1 else None,
        relative_delta_error=math.sqrt(squared_error / squared_norm) if squared_norm > 0 else 0.0,
        modules=records,
        out=str(out),
        parameters_before=sum(module.parameters for module in adapter.modules),
        parameters_after=sum(new_ranks[module.name] * (module.rows + module.columns) for module in adapter.modules),
        bytes_before=adapter.weights_file.stat().st_size,
        bytes_after=(out if out.is_file() else out / adapter.weights_file.name).stat().st_size,
        chosen_by=rule,
        notes=_build_notes(adapter),
    )


@dataclass(frozen=True, slots=True)
class RankedAdapter:
    """An adapter folder at a rank: that of a uniform adapter with as many parameters."""

    rank: int
    folder: AdapterFolder
    resized: Resized | None = None  # how it was truncated; None if it was not


def write_truncation(
    adapter: AdapterFolder, out: Path, rank: int, moments: Mapping[str, Moments] | None = None
) -> RankedAdapter:
    """Truncate an adapter to `rank` as a selection does, and write it."""
    resized = resize_adapter(adapter, out, cap_ranks(adapter, rank, moments), moments)
    return RankedAdapter(rank, open_adapter(out), resized)


def write_uniform_adapter(adapter: AdapterFolder, out: Path) -> None:
    """Write the same function with the largest rank in all modules; the additional directions are zero.

    If every module has the scale of `lora_alpha` and `r`, no value of a factor changes.

    Raises:
        ModelError: The initialization changes the base model, or `lora_alpha` is 0.
        RunFolderError: `out` exists or cannot be written.
    """
    config, largest = adapter.config, adapter.rank
    share = largest / config["r"]
    alpha = config["lora_alpha"] * (math.sqrt(share) if adapter.use_rslora else share)
    widened = replace(adapter, config=dict(config) | {"lora_alpha": alpha})
    resize_adapter(widened, out, {module.name: largest for module in adapter.modules})


def truncate_tensors(folder: Path, rank: int, config: Any, moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Return the tensors of the adapter in `folder`, in PEFT's names, with every A and B truncated and all others unchanged.

    Args:
        rank: The uniform rank, which sets the number of parameters.
        config: PEFT's configuration of the truncated adapter. The rank of each module is written into it, with an alpha that gives all
            modules one scale.
        moments: Second moments by module name. Modules that have them are truncated by K-FAC, the others by singular values.
    """
    adapter = open_adapter(folder)
    ranks = cap_ranks(adapter, rank, moments)
    if config.use_rslora:
        config.lora_alpha, config.use_rslora = _convert_to_plain_alpha(config.lora_alpha, config.r), False
    config.rank_pattern, config.alpha_pattern = _build_patterns(adapter, ranks, config.r, config.lora_alpha)
    scaling = config.lora_alpha / config.r
    return _resize_tensors(adapter, ranks, scaling, moments)


def _resize_tensors(
    adapter: AdapterFolder, ranks: Mapping[str, int], scaling: float, moments: Mapping[str, Moments]
) -> dict[str, Tensor]:
    """Return all tensors of an adapter whose modules have these ranks and one scale."""
    tensors = {key: adapter.load_tensor(key) for key in adapter.other_keys}
    with use_one_thread():
        for pair in adapter.pairs:
            tensors |= _resize_pair(adapter, pair, _find_pair_rank(pair, ranks), pair[0].scaling / scaling, moments)
    return tensors


def _resize_pair(
    adapter: AdapterFolder, pair: Sequence[AdapterModule], rank: int, ratio: float, moments: Mapping[str, Moments]
) -> dict[str, Tensor]:
    """Return the tensors of a pair at `rank`, computed in float64; the product is `ratio` times as large."""
    first = pair[0]
    new_factors = [
        (b * ratio, a)
        if rank == module.rank
        else resize_factors(b, a, rank, ratio, moments.get(module.name), module.scaling)
        for module, (b, a) in zip(pair, adapter.load_pair_factors(first), strict=True)
    ]
    old_a, old_b = adapter.load_tensor(first.a_key), adapter.load_tensor(first.b_key)
    new_a, new_b = pack_factors(new_factors, old_a.shape, old_b.shape)
    tensors = {first.b_key: narrow(new_b, old_b.dtype), first.a_key: narrow(new_a, old_a.dtype)}
    if first.bias_key is not None:  # PEFT scales it as it scales B
        bias = adapter.load_tensor(first.bias_key)
        tensors[first.bias_key] = narrow(widen(bias) * ratio, bias.dtype)
    if first.magnitude_key is not None:
        tensors[first.magnitude_key] = adapter.load_tensor(first.magnitude_key)
    return tensors


def _measure_errors(
    adapter: AdapterFolder, pair: Sequence[AdapterModule], scaling: float, tensors: Mapping[str, Tensor]
) -> list[tuple[AdapterModule, int, float, float]]:
    """Compute `(module, rank, ‖ΔW' − ΔW‖_F, ‖ΔW‖_F)` of each matrix of a pair, after rounding to the dtype of the file."""
    first, old_factors = pair[0], adapter.load_pair_factors(pair[0])
    rank = len(tensors[first.a_key]) // len(pair)
    new_factors = unpack_factors(widen(tensors[first.a_key]), widen(tensors[first.b_key]), rank)
    return [
        (
            module,
            rank,
            compute_distance(b * module.scaling, a, new_b * scaling, new_a),
            compute_distance(b * module.scaling, a, b[:, :0], a[:0]),
        )
        for module, (b, a), (new_b, new_a) in zip(pair, old_factors, new_factors, strict=True)
    ]


def _build_notes(adapter: AdapterFolder) -> list[str]:
    notes: list[str] = []
    if adapter.config.get("use_dora"):
        notes.append("DoRA: the magnitudes are kept; the error is that of s·B·A")
    sizes = [math.prod(adapter.file.shapes[key]) for key in adapter.other_keys if not key.endswith(".alpha")]
    if sizes:
        notes.append(f"unchanged: {len(sizes)} fully trained tensors with {sum(sizes):,} parameters")
    return notes


def _build_resized_config(adapter: AdapterFolder, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Build the configuration at these ranks: every module has the scale `lora_alpha / r`, as all servers read it.

    `lora_alpha` does not change, except that of rsLoRA, which is multiplied by √r. Where PEFT did not write the adapter, the scale does not
    change.

    If the modules differ, `r` is the uniform rank with as many parameters, provided that a server that reserves slots for it has room for the
    largest module; else it is the largest rank.
    """
    pair_ranks = [_find_pair_rank(pair, ranks) for pair in adapter.pairs]
    largest, sizes = max(pair_ranks), [pair[0].rows + pair[0].columns for pair in adapter.pairs]
    r = compute_equivalent_rank(pair_ranks, sizes)
    r = r if find_server_rank(r) >= largest else largest
    alpha = adapter.config["lora_alpha"] * (1 if adapter.foreign is None else r / adapter.config["r"])
    alpha = _convert_to_plain_alpha(alpha, r) if adapter.use_rslora else alpha
    rank_pattern, alpha_pattern = _build_patterns(adapter, ranks, r, alpha)
    return dict(adapter.config) | {
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "init_lora_weights": True,  # loading replaces the first values, and other names of PEFT do not take every rank
        "eva_config": None,
    }


def _convert_to_plain_alpha(lora_alpha: float, r: int) -> float:
    """Return the `lora_alpha` that has the scale of rsLoRA without `use_rslora`."""
    alpha = convert_scaling("alpha/sqrt(r)", lora_alpha, r)
    return int(alpha) if alpha.is_integer() else alpha


def _build_patterns(
    adapter: AdapterFolder, ranks: Mapping[str, int], r: int, lora_alpha: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build PEFT's `rank_pattern` and `alpha_pattern`, with which every module has the scale of `lora_alpha` at rank `r`."""
    by_address = {pair[0].address: _find_pair_rank(pair, ranks) for pair in adapter.pairs}
    alphas = compute_equal_scale_alphas(by_address, r, lora_alpha)
    return build_exact_pattern(by_address, r, by_address), build_exact_pattern(alphas, lora_alpha, by_address)


def _find_pair_rank(pair: Sequence[AdapterModule], ranks: Mapping[str, int]) -> int:
    """Return the rank of the matrices of a pair: the largest of any, because they share tensors."""
    return max(ranks[module.name] for module in pair)


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


def cap_ranks(adapter: AdapterFolder, rank: int, moments: Mapping[str, Moments] | None = None) -> dict[str, int]:
    """Return this rank for every module with a higher one, and the module's own rank for the others.

    If every module has moments and a higher rank, the parameters of this rank are allocated to the modules by one threshold on
    their K-FAC costs, up to the rank that a server reserves.
    """
    max_rank = find_server_rank(rank) if adapter.foreign is None else rank  # mlx-lm loads one rank for all modules
    moments, modules = moments or {}, adapter.modules
    if max_rank == rank or any(module.name not in moments or module.rank <= rank for module in modules):
        return {module.name: min(rank, module.rank) for module in modules}
    costs = [
        decompose_update(*adapter.load_factors(module), module.scaling, moments[module.name]).costs
        for module in modules
    ]
    parameters = [module.rows + module.columns for module in modules]
    allocated = allocate_ranks(costs, parameters, rank * sum(parameters), max_rank)
    return {module.name: module_rank for module, module_rank in zip(modules, allocated, strict=True)}


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
    return sorted({2**power for power in range(top.bit_length())} | {top})
