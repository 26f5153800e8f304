"""Singular spectra of updates, the ranks that they suggest, and what `inspect` records of them.

An update is ΔW = s·B·A with B [d, r] and A [r, k]. With B = Q_B R_B and Aᵀ = Q_A R_A, the singular values of B·A are
those of the r × r matrix R_B R_Aᵀ. All arithmetic is in float64.

What full fine-tuning changed is read one matrix at a time. Small matrices are decomposed exactly. Of larger ones a randomised range
finder with power iterations (Halko, Martinsson and Tropp 2011) gives the leading singular values; the energy ‖Δ‖²_F is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from rightrank.data.files import path_kind
from rightrank.models.adapter_reader import PREFIX, AdapterFolder, AdapterModule, natural_order, open_adapter
from rightrank.models.safetensors_files import read_header, safe_shards
from rightrank.schema.errors import ModelError
from rightrank.schema.results import Inspection, InspectionSummary, ModuleSpectrum
from rightrank.schema.trials import Floats

ENERGY_FRACTIONS = (0.9, 0.95, 0.99)
DEAD_FRACTION = 1e-3  # of the median norm of the modules
ROUNDING = 1e-6  # of the largest singular value; below it a value is rounding of float32 files, and not noise
MIN_VALUES_FOR_NOISE = 8  # the median of fewer singular values does not estimate noise
EXACT_SIDE = 1024  # shorter side up to which a difference is decomposed exactly
SKETCH_RANK = 128
OVERSAMPLING = 32
POWER_ITERATIONS = 3  # gives a singular value well above the rest within a relative error of 1e-3
SENTENCE = (
    "A spectrum describes where an update's energy is; it does not say which rank is enough: "
    "held-out data decide (rightrank resize --data, rightrank select)."
)


def spectrum_of(
    values: Floats, energy: float, kind: str, shape: tuple[int, int], flags: Sequence[str] = (), **about: Any
) -> ModuleSpectrum:
    """The record of one module's ΔW.

    Args:
        values: its singular values, descending; all of them unless `energy` exceeds the sum of their squares.
        energy: ‖ΔW‖²_F.
        about: name, rank and scaling.
    """
    partial = kind == "matrix" and len(values) < min(shape)
    noise = _rank_above_noise(values, energy, kind, shape, partial)
    unclear = values.any() and not partial and (2 * noise >= len(values) or len(values) < MIN_VALUES_FOR_NOISE)
    return ModuleSpectrum(
        kind=kind,
        shape=shape,
        singular_values=[float(value) for value in values],
        frobenius_norm=float(np.sqrt(energy)),
        spectral_norm=float(values[0]) if len(values) else 0.0,
        stable_rank=stable_rank(values, energy),
        effective_rank=None if partial else effective_rank(values),
        energy_rank={f"{part:g}": energy_rank(values, part, energy) for part in ENERGY_FRACTIONS},
        noise_rank=noise,
        flags=[*flags, *["partial_spectrum"] * partial, *["noise_unclear"] * bool(unclear)],  # the median may be signal
        **about,
    )


def _rank_above_noise(s: Floats, energy: float, kind: str, shape: tuple[int, int], partial: bool) -> int:
    """The rank by the hard threshold.

    The noise of an adapter is assumed in the r × r core that its factors span, that of a matrix in all entries.
    """
    if not s.any():
        return 0
    s = np.where(s > ROUNDING * s[0], s, 0.0)
    if kind != "matrix":
        return hard_threshold_rank(s, len(s), len(s))
    return leading_noise_rank(s, energy, *shape) if partial else hard_threshold_rank(s, *shape)


def _flag_dead(modules: Sequence[ModuleSpectrum]) -> list[ModuleSpectrum]:
    """The records with the flag `dead` on every module with a norm below DEAD_FRACTION of the median."""
    norms = [module.frobenius_norm for module in modules if module.frobenius_norm > 0]
    limit = DEAD_FRACTION * median(norms) if norms else 0.0
    return [
        module.model_copy(update={"flags": [*module.flags, "dead"]})
        if module.frobenius_norm < limit and not {"untrained", "no_token"} & set(module.flags)
        else module
        for module in modules
    ]


def inspection_of(spectra: Sequence[ModuleSpectrum], **about: Any) -> Inspection:
    """The spectra and their summary; `about` are the summary's other fields."""
    modules = _flag_dead(spectra)
    energy: dict[str, int | None] = {}
    for part in (f"{fraction:g}" for fraction in ENERGY_FRACTIONS):
        ranks = [module.energy_rank[part] for module in modules]
        energy[part] = None if None in ranks else max((rank for rank in ranks if rank is not None), default=0)
    summary = InspectionSummary(
        modules=len(modules),
        ranks=sorted({module.rank for module in modules}),
        energy_rank=energy,
        untrained=[module.name for module in modules if "untrained" in module.flags],
        dead=[module.name for module in modules if "dead" in module.flags],
        sentence=SENTENCE,
        **about,
    )
    return Inspection(modules=modules, summary=summary)


def inspect_adapter(path: Path) -> Inspection:
    """The spectra of an adapter.

    Raises:
        ModelError: no readable LoRA adapter, or NaN weights.
    """
    adapter = open_adapter(path)
    return inspection_of(
        [spectrum for pair in adapter.pairs for spectrum in _spectra(adapter, pair)],
        kind="adapter",
        scaling_rule="alpha/sqrt(r)" if adapter.use_rslora else "alpha/r",
        base_model=adapter.base_model,
        parameters=adapter.trained,
        modules_to_save=[key.removeprefix(PREFIX) for key in adapter.other_keys if not key.endswith(".alpha")],
        notes=_adapter_notes(adapter),
    )


def _adapter_notes(adapter: AdapterFolder) -> list[str]:
    """Notes to the figures: patterns without effect, DoRA, initialisations that change the base."""
    notes: list[str] = []
    if adapter.unused_patterns:
        notes.append(f"patterns that match no module and have no effect: {', '.join(adapter.unused_patterns)}")
    parts = sum(len(pair) > 1 for pair in adapter.pairs)
    if parts:
        notes.append(f"{parts} parameters hold experts: one spectrum for each, at the rank of the parameter")
    if adapter.use_dora:
        notes.append("DoRA: the spectra are those of s·B·A, without the magnitudes")
    if (init := adapter.base_changing_init) is not None:
        notes.append(
            f"initialised by {init}, which changes the base on loading: the figures are those of s·B·A, not of the whole update"
        )
    return notes


def _spectra(adapter: AdapterFolder, pair: Sequence[AdapterModule]) -> list[ModuleSpectrum]:
    """The spectra of a pair; of several experts, those that no token reached are flagged so.

    A token gives every direction of B a gradient, and Adam a step of about the learning rate. So an expert whose B is zero
    beside others that moved was never chosen, whereas one that learned nothing has an update that is small.
    """
    spectra = [_spectrum(adapter, module) for module in pair]
    if len(spectra) > 1 and any("untrained" not in spectrum.flags for spectrum in spectra):
        flags = [["no_token" if flag == "untrained" else flag for flag in spectrum.flags] for spectrum in spectra]
        spectra = [spectrum.model_copy(update={"flags": own}) for spectrum, own in zip(spectra, flags, strict=True)]
    return spectra


def _spectrum(adapter: AdapterFolder, module: AdapterModule) -> ModuleSpectrum:
    b, a = adapter.factors(module)
    values = abs(module.scaling) * factored_singular_values(b, a)
    # PEFT starts with B = 0 (with A = 0 for an embedding)
    flags = ["untrained"] * (not b.any() or not a.any())
    flags += ["dora"] * (module.magnitude_key is not None) + ["lora_bias"] * (module.bias_key is not None)
    about = {"name": module.name, "rank": module.rank, "scaling": module.scaling}
    shape = module.rows, module.columns
    return spectrum_of(values, float(np.sum(values**2)), module.kind.name, shape, flags, **about)


def factored_singular_values(b: Floats, a: Floats) -> Floats:
    """The min(d, r, k) singular values of B·A alone, padded with zeros to r of them."""
    s = np.linalg.svd(_triangle(b) @ _triangle(a.T).T, compute_uv=False)
    return np.pad(s, (0, max(0, b.shape[1] - len(s))))


def factored_distance(b: Floats, a: Floats, other_b: Floats, other_a: Floats) -> float:
    """‖B·A − B'·A'‖ in the Frobenius norm, through QR of the factors side by side."""
    left, right = _triangle(np.hstack([b, -other_b])), _triangle(np.vstack([a, other_a]).T)
    return float(np.linalg.norm(left @ right.T))


def _triangle(matrix: Floats) -> Floats:
    """The R of a QR decomposition."""
    triangle: Any = np.linalg.qr(matrix, mode="r")
    return np.asarray(triangle, dtype=np.float64)


def energy_rank(s: Floats, fraction: float, total: float | None = None) -> int | None:
    """The smallest number of leading singular values with `fraction` of the energy Σσ²; 0 for the zero matrix.

    `total` is the energy of the whole matrix if `s` is only its leading part. None if `s` is then too short.
    """
    energy = np.cumsum(s**2)
    whole = float(energy[-1]) if total is None else total
    if whole == 0:
        return 0
    # slack for rounding, so that the whole spectrum reaches 100%
    reached = np.flatnonzero(energy >= fraction * whole * (1 - 1e-12))
    return int(reached[0]) + 1 if len(reached) else None


def stable_rank(s: Floats, total: float | None = None) -> float:
    """‖ΔW‖²_F / ‖ΔW‖²_2; 0 for the zero matrix."""
    if len(s) == 0 or s[0] == 0:
        return 0.0
    return float((np.sum(s**2) if total is None else total) / s[0] ** 2)


def effective_rank(s: Floats) -> float:
    """exp of the entropy of σ/Σσ (Roy and Vetterli 2007); 0 for the zero matrix."""
    if s.sum() == 0:
        return 0.0
    p = s[s > 0] / s.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def hard_threshold_rank(s: Floats, rows: int, columns: int) -> int:
    """The number of singular values above the optimal hard threshold for unknown noise (Gavish and Donoho 2014).

    `s` must be all min(rows, columns) singular values of a rows × columns matrix: signal plus noise with independent
    entries of one variance. The threshold is ω(β) times their median, β the aspect ratio. It assumes that less than
    half of the singular values are signal. Otherwise the median is signal and the result is too low.
    """
    beta = min(rows, columns) / max(rows, columns)
    # The authors' cubic, off by .02 at most; 2.86 for β = 1.
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return int(np.sum(s > omega * np.median(s)))


def leading_noise_rank(s: Floats, total: float, rows: int, columns: int) -> int:
    """The same if only the leading singular values and the whole energy are known.

    The energy that the kept values leave is taken as noise; its variance per entry gives σ, and the threshold for known noise
    applies. This repeats until the count stays the same.
    """
    short, long = min(rows, columns), max(rows, columns)
    beta = short / long
    # λ*(β): the threshold in units of σ·sqrt(longer side), for noise of a known σ
    factor = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    count = len(s)
    for _ in range(20):
        rest = max(0.0, total - float(np.sum(s[:count] ** 2)))
        variance = rest / max(1, (rows - count) * (columns - count))
        kept = int(np.sum(s > factor * math.sqrt(variance * long))) if short > count else count
        if kept == count:
            break
        count = kept
    return count


def inspect_checkpoints(base: Path, finetuned: Path, sketch_rank: int = SKETCH_RANK) -> Inspection:
    """The spectra of `finetuned` minus `base`; only one matrix is in memory at a time.

    Raises:
        ModelError: a folder without safetensors, or two that differ in names or shapes.
    """
    before, after = open_weights(base), open_weights(finetuned)
    _require_alike(before, after)
    spectra: list[ModuleSpectrum] = []
    not_matrices: list[str] = []
    unchanged = 0
    for name, delta in _differences(before, after):
        if delta is None:
            unchanged += 1
        elif delta.dim() < 2:
            not_matrices.append(name)
        else:
            spectra.append(_matrix_spectrum(name, delta.flatten(1), sketch_rank))
    if not spectra and not not_matrices:
        raise ModelError(f"{finetuned}: every tensor is equal to that of {base}; give a fine-tuned model of this base")
    return inspection_of(
        spectra,
        kind="checkpoints",
        scaling_rule="none",
        base_model=str(base),
        parameters=sum(math.prod(spectrum.shape) for spectrum in spectra),
        unchanged=unchanged,
        not_matrices=not_matrices,
    )


def _require_alike(before: _WeightFolder, after: _WeightFolder) -> None:
    """Refuse two checkpoints of different architectures.

    Raises:
        ModelError: a tensor name or shape that only one of them has.
    """
    for ours, theirs in ((before, after), (after, before)):
        missing = sorted(ours.files.keys() - theirs.files.keys())
        if missing:
            raise ModelError(
                f"{theirs.path}: has no tensor {missing[0]} that {ours.path} has ({len(missing)} such); give two checkpoints of one architecture"
            )
    for name, shape in before.shapes.items():
        if after.shapes[name] != shape:
            raise ModelError(
                f"{name}: {list(shape)} in {before.path} and {list(after.shapes[name])} in {after.path}; give two checkpoints of one architecture"
            )


def _differences(before: _WeightFolder, after: _WeightFolder) -> Iterator[tuple[str, torch.Tensor | None]]:
    """The change of every floating-point tensor in float32, in the natural order of names; None where nothing changed.

    Raises:
        ModelError: a value that is NaN or infinite.
    """
    for name in sorted(before.files, key=natural_order):
        old, new = before.tensor(name), after.tensor(name)
        if not old.is_floating_point():
            continue
        if torch.equal(old, new.to(old.dtype)) and torch.equal(new, old.to(new.dtype)):
            yield name, None
            continue
        delta = new.float() - old.float()
        del old, new
        if not all(torch.isfinite(bound) for bound in torch.aminmax(delta)):  # without the copy that isfinite makes
            raise ModelError(
                f"{name}: NaN or infinite values in {before.path} or {after.path}; give an undamaged checkpoint"
            )
        yield name, delta


def _matrix_spectrum(name: str, delta: torch.Tensor, sketch_rank: int) -> ModuleSpectrum:
    """The record of one difference: all singular values up to a shorter side of EXACT_SIDE, else the leading ones."""
    if min(delta.shape) <= EXACT_SIDE:
        tall = delta if delta.shape[0] >= delta.shape[1] else delta.T
        values: Floats = torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R.double()).numpy()
        energy = float(np.sum(values**2))
    else:
        values = _sketched_values(delta, sketch_rank)
        rows = max(1, 2**22 // delta.shape[1])  # at a time, in float64
        blocks = (delta[start : start + rows] for start in range(0, len(delta), rows))
        energy = float(sum(float(block.double().square().sum()) for block in blocks))
    about: dict[str, Any] = {"name": name.removesuffix(".weight"), "rank": min(delta.shape), "scaling": 1.0}
    return spectrum_of(values, energy, "matrix", (delta.shape[0], delta.shape[1]), **about)


def _sketched_values(delta: torch.Tensor, rank: int) -> Floats:
    """The leading singular values of `delta` [d, k]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, leading, _ = torch.svd_lowrank(delta, min(rank + OVERSAMPLING, *delta.shape), POWER_ITERATIONS)
    values: Floats = leading[:rank].double().numpy()
    return values


@dataclass(frozen=True, slots=True)
class _WeightFolder:
    """Names, files and shapes of the tensors; a tensor is read on access."""

    path: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    def tensor(self, name: str) -> torch.Tensor:
        # Closing the file releases its mapped pages, so that memory holds one tensor at a time.
        with safe_open(self.files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


def open_weights(path: Path) -> _WeightFolder:
    """Read the headers of a model folder's tensors.

    Raises:
        ModelError: no such folder, no safetensors, pickled weights, or a shard that is missing or damaged.
    """
    if path_kind(path) != "folder":
        raise ModelError(f"{path}: no such folder; give a model folder that save_pretrained wrote")
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in safe_shards(path):
        tensors, _ = read_header(shard)
        files |= dict.fromkeys(tensors, shard)
        shapes |= tensors
    return _WeightFolder(path, files, shapes)
