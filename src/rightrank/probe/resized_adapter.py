"""An adapter folder at other ranks: new factors, new configuration, and the error of the written tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rightrank.errors import ModelError
from rightrank.io.adapter_folder import (
    WEIGHTS_FILE,
    AdapterFolder,
    AdapterModule,
    write_adapter,
)
from rightrank.io.files import require_absent
from rightrank.io.patterns import exact_pattern, lora_scaling
from rightrank.io.truncation import resized_factors
from rightrank.maths.spectra import factored_distance
from rightrank.maths.truncation import Moments
from rightrank.probe.rank_choice import RankChoice
from rightrank.records.probe import ModuleResize, Resized
from rightrank.settings import DtypeName


@dataclass(frozen=True, slots=True)
class NewModule:
    """A module's tensors at its new rank, and the distance of its ΔW from the original."""

    tensors: Mapping[str, torch.Tensor]
    error: float  # ‖ΔW' − ΔW‖_F after rounding to the dtype of the file
    norm: float  # ‖ΔW‖_F
    record: ModuleResize


def write_resized(
    adapter: AdapterFolder,
    out: Path,
    choice: RankChoice,
    dtype: DtypeName | None = None,
    moments: Mapping[str, Moments] | None = None,
) -> Resized:
    """Write `adapter` at the chosen ranks to `out`; `dtype` None keeps the dtype of every tensor.

    Modules with moments are truncated by K-FAC, the others by singular values.

    Raises:
        ModelError: NaN weights, or an initialisation that changes the base.
        RunFolderError: `out` exists or cannot be written.
    """
    require_absent(out)
    require_plain_update(adapter)
    known = moments or {}
    modules = [
        _new_module(adapter, module, choice.ranks[module.name], dtype, known.get(module.name))
        for module in adapter.modules
    ]
    tensors = {key: value for module in modules for key, value in module.tensors.items()}
    tensors |= {key: adapter.tensor(key) for key in adapter.other_keys}
    write_adapter(out, resized_config(adapter, choice.ranks), tensors)
    ranks = set(choice.ranks.values())
    return Resized(
        rank=ranks.pop() if len(ranks) == 1 else None,
        relative_delta_error=_relative(
            math.hypot(*(module.error for module in modules)), math.hypot(*(module.norm for module in modules))
        ),
        modules=[module.record for module in modules],
        out=str(out),
        parameters_before=sum(module.parameters for module in adapter.modules),
        parameters_after=sum(choice.ranks[module.name] * (module.rows + module.columns) for module in adapter.modules),
        bytes_before=adapter.weights.stat().st_size,
        bytes_after=(out / WEIGHTS_FILE).stat().st_size,
        chosen_by=choice.chosen_by,
        notes=[*choice.notes, *_notes(adapter)],
    )


def require_plain_update(adapter: AdapterFolder) -> None:
    """Refuse an adapter whose ΔW is not s·B·A alone.

    Raises:
        ModelError: the initialisation changes the base on loading.
    """
    if (init := adapter.base_changing_init) is not None:
        raise ModelError(
            f"{adapter.path}: init_lora_weights is {init!r}, which changes the base on loading, by an amount that depends on "
            "the rank; convert it first: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def resized_config(adapter: AdapterFolder, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The configuration with the largest rank as `r` and a `rank_pattern` for the others; alphas do not change."""
    largest = max(ranks.values())
    used = {key: value for key, value in adapter.config["alpha_pattern"].items() if key not in adapter.unused_patterns}
    return dict(adapter.config) | {
        "r": largest,
        "rank_pattern": exact_pattern(ranks, largest, ranks),
        "alpha_pattern": used,
    }


def _new_module(
    adapter: AdapterFolder, module: AdapterModule, rank: int, dtype: DtypeName | None, moments: Moments | None
) -> NewModule:
    b, a = adapter.factors(module)
    old_b, old_a = adapter.tensor(module.b_key), adapter.tensor(module.a_key)
    scaling = lora_scaling(module.lora_alpha, rank, adapter.use_rslora)
    ratio = module.scaling / scaling
    old = torch.from_numpy(b), torch.from_numpy(a)
    if rank == module.rank:
        new_b, new_a = old[0] * ratio, old[1]
    else:
        new_b, new_a = resized_factors(*old, rank, ratio, moments, module.scaling)
    tensors = {
        module.b_key: _like(new_b, old_b, rank, dtype, first=False),
        module.a_key: _like(new_a, old_a, rank, dtype, first=True),
    }
    if module.bias_key is not None:  # PEFT scales it as it scales B
        bias = adapter.tensor(module.bias_key)
        tensors[module.bias_key] = (bias.double() * ratio).to(bias.dtype)
    if module.magnitude_key is not None:
        tensors[module.magnitude_key] = adapter.tensor(module.magnitude_key)
    written_b = tensors[module.b_key].double().reshape(module.rows, rank).numpy()
    written_a = tensors[module.a_key].double().reshape(rank, module.columns).numpy()
    error = factored_distance(b * module.scaling, a, written_b * scaling, written_a)
    norm = factored_distance(b * module.scaling, a, np.zeros((module.rows, 0)), np.zeros((0, module.columns)))
    record = ModuleResize(
        name=module.name, from_rank=module.rank, rank=rank, relative_delta_error=_relative(error, norm)
    )
    return NewModule(tensors, error, norm, record)


def _like(values: torch.Tensor, old: torch.Tensor, rank: int, dtype: DtypeName | None, *, first: bool) -> torch.Tensor:
    """`values` in the layout of `old`, its rank dimension replaced."""
    shape = list(old.shape)
    shape[0 if first else 1] = rank
    return values.reshape(shape).to(old.dtype if dtype is None else getattr(torch, dtype))


def _relative(error: float, norm: float) -> float:
    return error / norm if norm > 0 else 0.0


def _notes(adapter: AdapterFolder) -> list[str]:
    notes: list[str] = []
    if adapter.unused_patterns:
        notes.append(f"patterns that match no module were left out: {', '.join(adapter.unused_patterns)}")
    if adapter.use_dora:
        notes.append("DoRA: the magnitudes are kept; the error is that of s·B·A")
    return notes
