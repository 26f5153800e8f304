"""Change the ranks of an adapter folder: new factors, a new configuration, and the error of the written tensors.

`resize` chooses one rank for all modules, ranks by energy, or a rank by held-out data (`resize_by_data`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from rightrank.adapters.adapter_reader import AdapterFolder, AdapterModule
from rightrank.adapters.resizing import (
    build_resized_config,
    compute_config_scaling,
    find_pair_rank,
    require_plain_update,
    write_resized_adapter,
)
from rightrank.adapters.spectra import compute_distance, compute_energy_rank, compute_singular_values
from rightrank.adapters.truncation import Moments
from rightrank.data.files import require_absent
from rightrank.schema.errors import SettingsError
from rightrank.schema.results import ModuleResize, Resized


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
    tensors = write_resized_adapter(adapter, out, ranks, moments)
    scaling = compute_config_scaling(build_resized_config(adapter, ranks))
    errors = [
        error
        for pair in adapter.pairs
        for error in _measure_errors(adapter, pair, find_pair_rank(pair, ranks), scaling, tensors)
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
        bytes_after=(out if out.is_file() else out / adapter.weights_file.name).stat().st_size,
        chosen_by=rule,
        notes=_build_notes(adapter, tensors),
    )


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
        ranks[module.name] = max(1, compute_energy_rank(s, fraction))
    return dict.fromkeys(ranks, max(ranks.values())) if uniform else ranks
