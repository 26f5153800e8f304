"""An adapter folder at other ranks: new factors, new configuration, and the error of the written tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from rightrank.adapters.spectra import factored_distance
from rightrank.data.files import creating, replacing, replacing_folder, require_absent
from rightrank.models.adapter_files import (
    MLX_FILE,
    RANK,
    AdapterFolder,
    AdapterModule,
    is_alpha,
    mlx_key,
    open_adapter,
    write_adapter,
)
from rightrank.models.places import CONFIG_FILE, read_header
from rightrank.models.ranks import exact_pattern, lora_scaling
from rightrank.models.truncation import Moments, resized_factors
from rightrank.schema.errors import ModelError
from rightrank.schema.results import ModuleResize, Resized
from rightrank.schema.trials import Floats


@dataclass(frozen=True, slots=True)
class RankChoice:
    """A rank for every module, and the rule that chose it."""

    ranks: Mapping[str, int]
    chosen_by: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _NewPair:
    """The tensors of a pair at its new rank, and for each of its matrices the distance of ΔW from the original."""

    tensors: Mapping[str, torch.Tensor]
    errors: list[float]  # ‖ΔW' − ΔW‖_F after rounding to the dtype of the file
    norms: list[float]  # ‖ΔW‖_F
    records: list[ModuleResize]


def write_resized(
    adapter: AdapterFolder,
    out: Path,
    choice: RankChoice,
    moments: Mapping[str, Moments] | None = None,
) -> Resized:
    """Write `adapter` at the chosen ranks to `out`.

    Modules with moments are truncated by K-FAC, the others by singular values. The error is that of s·B·A, of DoRA too.

    Raises:
        ModelError: NaN weights, or an initialisation that changes the base.
        RunFolderError: `out` exists or cannot be written.
    """
    require_absent(out)
    require_plain_update(adapter)
    pairs = [_new_pair(adapter, pair, choice.ranks, moments or {}) for pair in adapter.pairs]
    tensors = {key: value for pair in pairs for key, value in pair.tensors.items()}
    others = {key: adapter.tensor(key) for key in adapter.other_keys}
    tensors |= others
    write_like(adapter, out, _resized_config(adapter, choice.ranks), tensors)
    records = [record for pair in pairs for record in pair.records]
    ranks = {record.name: record.rank for record in records}
    total = math.hypot(*(error for pair in pairs for error in pair.errors))
    return Resized(
        rank=ranks[records[0].name] if len(set(ranks.values())) == 1 else None,
        relative_delta_error=_relative(total, math.hypot(*(norm for pair in pairs for norm in pair.norms))),
        modules=records,
        out=str(out),
        parameters_before=sum(module.parameters for module in adapter.modules),
        parameters_after=sum(ranks[module.name] * (module.rows + module.columns) for module in adapter.modules),
        bytes_before=adapter.weights.stat().st_size,
        bytes_after=adapter.weights_in(out).stat().st_size,
        chosen_by=choice.chosen_by,
        notes=[*choice.notes, *_notes(adapter), *_whole(others)],
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


def _resized_config(adapter: AdapterFolder, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The configuration with the largest rank as `r` and a `rank_pattern` for the others; alphas do not change."""
    by_address = {pair[0].address: _common(pair, ranks) for pair in adapter.pairs}
    largest = max(by_address.values())
    used = {key: value for key, value in adapter.config["alpha_pattern"].items() if key not in adapter.unused_patterns}
    return dict(adapter.config) | {
        "r": largest,
        "rank_pattern": exact_pattern(by_address, largest, by_address),
        "alpha_pattern": used,
    }


def _common(pair: Sequence[AdapterModule], ranks: Mapping[str, int]) -> int:
    """The rank of the matrices of a pair: the largest of any, since they share tensors."""
    return max(ranks[module.name] for module in pair)


def write_truncated(
    adapter: AdapterFolder, out: Path, choice: RankChoice, moments: Mapping[str, Moments] | None = None
) -> None:
    """As `write_resized`, without the error of what is written: most of the time of a large adapter."""
    tensors = {key: adapter.tensor(key) for key in adapter.other_keys}
    for pair in adapter.pairs:
        old = [adapter.factors(module) for module in pair]
        tensors |= _new_tensors(adapter, pair, old, _common(pair, choice.ranks), moments or {})
    write_like(adapter, out, _resized_config(adapter, choice.ranks), tensors)


def _new_pair(
    adapter: AdapterFolder, pair: Sequence[AdapterModule], ranks: Mapping[str, int], moments: Mapping[str, Moments]
) -> _NewPair:
    first, rank = pair[0], _common(pair, ranks)
    scaling = lora_scaling(first.lora_alpha, rank, adapter.use_rslora)
    old = [adapter.factors(module) for module in pair]
    tensors = _new_tensors(adapter, pair, old, rank, moments)
    written = first.how.matrices(tensors[first.a_key].double(), tensors[first.b_key].double(), rank)
    measured = []  # (‖ΔW' − ΔW‖_F, ‖ΔW‖_F)
    for module, (old_b, old_a), (new_b, new_a) in zip(pair, old, written, strict=True):
        before, after = (old_b * module.scaling, old_a), (new_b.numpy() * scaling, new_a.numpy())
        none = np.zeros((module.rows, 0)), np.zeros((0, module.columns))
        measured.append((factored_distance(*before, *after), factored_distance(*before, *none)))
    records = [
        ModuleResize(name=module.name, from_rank=module.rank, rank=rank, relative_delta_error=_relative(*found))
        for module, found in zip(pair, measured, strict=True)
    ]
    return _NewPair(tensors, [error for error, _ in measured], [norm for _, norm in measured], records)


def _new_tensors(
    adapter: AdapterFolder,
    pair: Sequence[AdapterModule],
    old: Sequence[tuple[Floats, Floats]],
    rank: int,
    moments: Mapping[str, Moments],
) -> dict[str, torch.Tensor]:
    """The tensors of a pair with the factors `old` at `rank`."""
    first = pair[0]
    ratio = first.scaling / lora_scaling(first.lora_alpha, rank, adapter.use_rslora)
    new = []
    for module, (b, a) in zip(pair, old, strict=True):
        matrices = torch.from_numpy(b), torch.from_numpy(a)
        if rank == module.rank:
            new.append((matrices[0] * ratio, matrices[1]))
        else:
            new.append(resized_factors(*matrices, rank, ratio, moments.get(module.name), module.scaling))
    old_a, old_b = adapter.tensor(first.a_key), adapter.tensor(first.b_key)
    new_a, new_b = first.how.tensors(new, old_a, old_b)
    tensors = {first.b_key: new_b.to(old_b.dtype).contiguous(), first.a_key: new_a.to(old_a.dtype).contiguous()}
    if first.bias_key is not None:  # PEFT scales it as it scales B
        bias = adapter.tensor(first.bias_key)
        tensors[first.bias_key] = (bias.double() * ratio).to(bias.dtype)
    if first.magnitude_key is not None:
        tensors[first.magnitude_key] = adapter.tensor(first.magnitude_key)
    return tensors


def _relative(error: float, norm: float) -> float:
    return error / norm if norm > 0 else 0.0


def _whole(others: Mapping[str, torch.Tensor]) -> list[str]:
    """What the adapter holds besides its factors."""
    kept = [tensor.numel() for key, tensor in others.items() if not is_alpha(key)]
    return [f"kept as they are: {len(kept)} tensors trained whole, {sum(kept):,} parameters"] if kept else []


def _notes(adapter: AdapterFolder) -> list[str]:
    notes: list[str] = []
    if adapter.unused_patterns:
        notes.append(f"patterns that match no module were left out: {', '.join(adapter.unused_patterns)}")
    if adapter.use_dora:
        notes.append("DoRA: the magnitudes are kept; the error is that of s·B·A")
    return notes


NOT_PADDED = ("use_dora", "lora_bias")  # options that servers do not support


def write_padded(source: Path, out: Path, rank: int, files: Mapping[str, bytes] | None = None) -> None:
    """Write the adapter in `source` to `out` with `rank` in every module, an integer `lora_alpha` and no patterns.

    Servers that support neither patterns nor rsLoRA take such an adapter. Rows of zeros appended to A and columns of zeros
    appended to B leave B·A unchanged. A module whose scale differs from alpha/rank has the ratio multiplied into its B,
    rounded to the file's dtype; as many modules as possible keep their numbers.

    Raises:
        ModelError: not a LoRA adapter, an adapter with DoRA or biases, or a module above `rank`.
        RunFolderError: `out` exists or can't be written.
    """
    adapter = open_adapter(source)
    _require_plain(adapter, rank)
    scalings = [module.scaling for module in adapter.modules]
    alpha = max(1, round(max(scalings, key=scalings.count) * rank))
    tensors = {key: adapter.tensor(key) for key in adapter.other_keys}
    for module in adapter.modules:
        a, b = adapter.tensor(module.a_key), adapter.tensor(module.b_key)
        ratio, more = module.scaling / (alpha / rank), rank - module.rank
        if ratio != 1.0:
            b = (b.double() * ratio).to(b.dtype)
        tensors[module.a_key] = torch.cat([a, a.new_zeros(more, *a.shape[1:])], dim=0)
        tensors[module.b_key] = torch.cat([b, b.new_zeros(b.shape[0], more, *b.shape[2:])], dim=1)
    changes = {"r": rank, "lora_alpha": alpha, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    write_adapter(out, dict(adapter.config) | changes, tensors, source, files)


def _require_plain(adapter: AdapterFolder, rank: int) -> None:
    kinds = dict.fromkeys(module.how for module in adapter.modules)
    obstacles = [name for name in NOT_PADDED if adapter.config.get(name)]
    obstacles += [f"{kind.label} ({kind.why_not_padded})" for kind in kinds if kind.why_not_padded]
    if adapter.base_changing_init is not None:
        obstacles.append(f"init_lora_weights {adapter.base_changing_init}")
    if obstacles:
        raise ModelError(
            f"{adapter.path}: an adapter with {obstacles[0]} can't be padded; merge it into the base to serve it"
        )
    if (above := max(adapter.modules, key=lambda module: module.rank)).rank > rank:
        raise ModelError(f"{adapter.path}: {above.name} has rank {above.rank}, above {rank}; resize the adapter first")


def write_like(
    adapter: AdapterFolder,
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a changed adapter in the format of `adapter`: a folder of PEFT or mlx-lm, or a LoRA file.

    PEFT's keeps what lies beside it, and gets further `files`.

    Raises:
        RunFolderError: `out` exists, or can't be written.
    """
    if adapter.mlx is not None:
        _write_mlx(out, adapter.mlx, config, tensors)
        return
    if not adapter.is_file:
        write_adapter(out, config, tensors, adapter.path, files)
        return
    _, metadata = read_header(adapter.path)
    metadata = {name: str(config["r"]) if name == RANK else value for name, value in metadata.items()}
    with creating(out), replacing(out) as temporary:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata)


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
