"""An adapter folder at other ranks: new factors, new configuration, and the error of the written tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rightrank.data.files import require_absent
from rightrank.models.adapter_files import AdapterFolder, AdapterModule, write_adapter, write_like
from rightrank.models.kinds.other import dora_weight
from rightrank.models.lora_files import is_alpha
from rightrank.models.ranks import exact_pattern, lora_scaling
from rightrank.models.spectra import factored_distance
from rightrank.models.truncation import Moments, resized_factors
from rightrank.models.weights import WeightFolder, open_weights
from rightrank.schema.arrays import Floats
from rightrank.schema.errors import ModelError
from rightrank.schema.results import ModuleResize, Resized
from rightrank.schema.settings import DtypeName

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
    dtype: DtypeName | None = None,
    moments: Mapping[str, Moments] | None = None,
    base: str | None = None,
) -> Resized:
    """Write `adapter` at the chosen ranks to `out`; `dtype` None keeps the dtype of every tensor.

    Modules with moments are truncated by K-FAC, the others by singular values. The error of a DoRA adapter is that of the
    whole update where the weights of its base are at hand: in the folder `base`, or in the one that it names.

    Raises:
        ModelError: NaN weights, an initialisation that changes the base, or a base of other shapes.
        RunFolderError: `out` exists or cannot be written.
    """
    require_absent(out)
    require_plain_update(adapter)
    known, weights = moments or {}, _base_weights(adapter, base)
    pairs = [_new_pair(adapter, pair, choice.ranks, _How(dtype, known, weights)) for pair in adapter.pairs]
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
        notes=[*choice.notes, *_notes(adapter, weights), *_whole(others)],
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


@dataclass(frozen=True, slots=True)
class _How:
    """How pairs are written and measured."""

    dtype: DtypeName | None
    moments: Mapping[str, Moments]
    weights: WeightFolder | None  # of the base, for DoRA


def write_truncated(
    adapter: AdapterFolder, out: Path, choice: RankChoice, moments: Mapping[str, Moments] | None = None
) -> None:
    """As `write_resized`, without the error of what is written: most of the time of a large adapter."""
    tensors = {key: adapter.tensor(key) for key in adapter.other_keys}
    for pair in adapter.pairs:
        old = [adapter.factors(module) for module in pair]
        tensors |= _new_tensors(adapter, pair, old, _common(pair, choice.ranks), _How(None, moments or {}, None))
    write_like(adapter, out, _resized_config(adapter, choice.ranks), tensors)


def _new_pair(adapter: AdapterFolder, pair: Sequence[AdapterModule], ranks: Mapping[str, int], how: _How) -> _NewPair:
    first, rank = pair[0], _common(pair, ranks)
    scaling = lora_scaling(first.lora_alpha, rank, adapter.use_rslora)
    old = [adapter.factors(module) for module in pair]
    tensors = _new_tensors(adapter, pair, old, rank, how)
    written = first.how.matrices(tensors[first.a_key].double(), tensors[first.b_key].double(), rank)
    measured = [
        _distance(adapter, module, before, (b.numpy() * scaling, a.numpy()), how.weights)
        for module, before, (b, a) in zip(pair, old, written, strict=True)
    ]
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
    how: _How,
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
            new.append(resized_factors(*matrices, rank, ratio, how.moments.get(module.name), module.scaling))
    old_a, old_b = adapter.tensor(first.a_key), adapter.tensor(first.b_key)
    new_a, new_b = first.how.tensors(new, old_a, old_b)
    tensors = {first.b_key: _as(new_b, old_b, how.dtype), first.a_key: _as(new_a, old_a, how.dtype)}
    if first.bias_key is not None:  # PEFT scales it as it scales B
        bias = adapter.tensor(first.bias_key)
        tensors[first.bias_key] = (bias.double() * ratio).to(bias.dtype)
    if first.magnitude_key is not None:
        tensors[first.magnitude_key] = adapter.tensor(first.magnitude_key)
    return tensors


def _distance(
    adapter: AdapterFolder,
    module: AdapterModule,
    old: tuple[Floats, Floats],
    new: tuple[Floats, Floats],
    weights: WeightFolder | None,
) -> tuple[float, float]:
    """`(‖ΔW' − ΔW‖_F, ‖ΔW‖_F)` from factors, the scale in B; of the whole update of DoRA with the weights of its base."""
    b, a = old[0] * module.scaling, old[1]
    if module.magnitude_key is not None and weights is not None:
        weight = _base_weight(weights, module, adapter)
        magnitude = adapter.tensor(module.magnitude_key).double()
        updates = [torch.from_numpy(left @ right) for left, right in ((b, a), new)]
        before, after = (dora_weight(weight, update, magnitude) for update in updates)
        return float((after - before).norm()), float((before - weight).norm())
    none = np.zeros((module.rows, 0)), np.zeros((0, module.columns))
    return factored_distance(b, a, *new), factored_distance(b, a, *none)


def _base_weight(weights: WeightFolder, module: AdapterModule, adapter: AdapterFolder) -> torch.Tensor:
    """The base's weight [rows, columns] under a module, in float64.

    Raises:
        ModelError: the base has no such weight, or one of another size.
    """
    name = weights.weight_of(module.name)
    found = None if name is None else weights.tensor(name).double()
    if found is not None:
        matrix = found.reshape(found.shape[0], -1)
        transposed = module.kind == "embedding" or bool(adapter.config.get("fan_in_fan_out"))
        matrix = matrix.T if transposed else matrix
        if tuple(matrix.shape) == (module.rows, module.columns):
            return matrix
    raise ModelError(
        f"{weights.path}: not this adapter's base: it has no weight [{module.rows}, {module.columns}] for {module.name}; "
        "give the model that the adapter was trained on"
    )


def _base_weights(adapter: AdapterFolder, base: str | None) -> WeightFolder | None:
    """The weights that a DoRA adapter's error takes: those of `base`, or of the folder that it names, if it is here."""
    if not any(module.magnitude_key for module in adapter.modules):
        return None
    named = base or adapter.base_model
    return open_weights(Path(named)) if named and any(Path(named).glob("*.safetensors")) else None


def _as(values: torch.Tensor, old: torch.Tensor, dtype: DtypeName | None) -> torch.Tensor:
    return values.to(old.dtype if dtype is None else getattr(torch, dtype)).contiguous()


def _relative(error: float, norm: float) -> float:
    return error / norm if norm > 0 else 0.0


def _whole(others: Mapping[str, torch.Tensor]) -> list[str]:
    """What the adapter holds besides its factors."""
    kept = [tensor.numel() for key, tensor in others.items() if not is_alpha(key)]
    return [f"kept as they are: {len(kept)} tensors trained whole, {sum(kept):,} parameters"] if kept else []


def _notes(adapter: AdapterFolder, weights: WeightFolder | None) -> list[str]:
    notes: list[str] = []
    if adapter.unused_patterns:
        notes.append(f"patterns that match no module were left out: {', '.join(adapter.unused_patterns)}")
    if adapter.use_dora:
        whole = (
            "the whole update" if weights is not None else "s·B·A (with the base's folder, of the whole update: --base)"
        )
        notes.append(f"DoRA: the magnitudes are kept; the error is that of {whole}")
    return notes
