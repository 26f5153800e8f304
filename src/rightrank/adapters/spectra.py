"""Compute singular spectra of updates, the ranks that they suggest, and the records of `inspect`.

An update is ΔW = s·B·A with B [d, r] and A [r, k]. With B = Q_B R_B and Aᵀ = Q_A R_A, the singular values of B·A are
those of the r × r matrix R_B R_Aᵀ. All arithmetic is in float64. R is the Cholesky factor of the Gram matrix, or that of a QR
decomposition if the columns are nearly dependent.

The update of full fine-tuning is read one matrix at a time. Small matrices are decomposed exactly. For larger ones a randomized range
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

from rightrank.adapters.adapter_folders import PEFT_PREFIX
from rightrank.adapters.adapter_reader import AdapterFolder, AdapterModule, natural_sort_key, open_adapter
from rightrank.bases.safetensors_files import find_shards, read_header
from rightrank.data.files import detect_path_kind
from rightrank.schema.errors import ModelError
from rightrank.schema.results import Inspection, InspectionSummary, ModuleSpectrum
from rightrank.schema.trials import Floats

ENERGY_FRACTIONS = (0.9, 0.95, 0.99)
DEAD_FRACTION = 1e-3  # relative to the median norm of the modules
ROUNDING = 1e-6  # relative to the largest singular value; a value below it is rounding of float32 files, and not noise
MIN_VALUES_FOR_NOISE = 8  # the median of fewer singular values does not estimate noise
MAX_INVERSE_GRAM = (
    1e5  # bounds the relative error of a singular value by 1e-9; a Gram matrix squares the condition number
)
EXACT_SIDE = 1024  # shorter side up to which a difference is decomposed exactly
SKETCH_RANK = 128
OVERSAMPLING = 32
POWER_ITERATIONS = 3  # gives a singular value well above the rest within a relative error of 1e-3
SENTENCE = (
    "A spectrum describes where an update's energy is; it does not say which rank is enough: "
    "held-out data decide (rightrank resize --data, rightrank select)."
)


def build_spectrum(
    values: Floats, energy: float, kind: str, shape: tuple[int, int], flags: Sequence[str] = (), **fields: Any
) -> ModuleSpectrum:
    """Build the record of one module's ΔW.

    Args:
        values: Its singular values, descending; all of them unless `energy` exceeds the sum of their squares.
        energy: ‖ΔW‖²_F.
        fields: Name, rank and scaling.
    """
    is_partial = kind == "matrix" and len(values) < min(shape)
    noise = _estimate_noise_rank(values, energy, kind, shape, is_partial)
    is_unclear = values.any() and not is_partial and (2 * noise >= len(values) or len(values) < MIN_VALUES_FOR_NOISE)
    return ModuleSpectrum(
        kind=kind,
        shape=shape,
        singular_values=[float(value) for value in values],
        frobenius_norm=float(np.sqrt(energy)),
        spectral_norm=float(values[0]) if len(values) else 0.0,
        stable_rank=compute_stable_rank(values, energy),
        effective_rank=None if is_partial else compute_effective_rank(values),
        energy_rank={f"{fraction:g}": compute_energy_rank(values, fraction, energy) for fraction in ENERGY_FRACTIONS},
        noise_rank=noise,
        flags=[
            *flags,
            *["partial_spectrum"] * is_partial,
            *["noise_unclear"] * bool(is_unclear),
        ],  # the median may be signal
        **fields,
    )


def _estimate_noise_rank(s: Floats, energy: float, kind: str, shape: tuple[int, int], partial: bool) -> int:
    """Estimate the rank above the noise by the hard threshold.

    The noise of an adapter is assumed in the r × r core that its factors span, the noise of a matrix in all entries.
    """
    if not s.any():
        return 0
    s = np.where(s > ROUNDING * s[0], s, 0.0)
    if kind != "matrix":
        return compute_hard_threshold_rank(s, len(s), len(s))
    return compute_leading_noise_rank(s, energy, *shape) if partial else compute_hard_threshold_rank(s, *shape)


def _flag_dead_modules(modules: Sequence[ModuleSpectrum]) -> list[ModuleSpectrum]:
    """Add the flag `dead` to every module with a norm below DEAD_FRACTION of the median."""
    norms = [module.frobenius_norm for module in modules if module.frobenius_norm > 0]
    limit = DEAD_FRACTION * median(norms) if norms else 0.0
    return [
        module.model_copy(update={"flags": [*module.flags, "dead"]})
        if module.frobenius_norm < limit and not {"untrained", "no_token"} & set(module.flags)
        else module
        for module in modules
    ]


def build_inspection(spectra: Sequence[ModuleSpectrum], **summary_fields: Any) -> Inspection:
    """Build the record of all spectra with their summary.

    Args:
        summary_fields: Additional fields of the summary.
    """
    modules = _flag_dead_modules(spectra)
    energy: dict[str, int | None] = {}
    for fraction_text in (f"{fraction:g}" for fraction in ENERGY_FRACTIONS):
        ranks = [module.energy_rank[fraction_text] for module in modules]
        energy[fraction_text] = None if None in ranks else max((rank for rank in ranks if rank is not None), default=0)
    summary = InspectionSummary(
        modules=len(modules),
        ranks=sorted({module.rank for module in modules}),
        energy_rank=energy,
        untrained=[module.name for module in modules if "untrained" in module.flags],
        dead=[module.name for module in modules if "dead" in module.flags],
        sentence=SENTENCE,
        **summary_fields,
    )
    return Inspection(modules=modules, summary=summary)


def inspect_adapter(path: Path) -> Inspection:
    """Inspect the spectra of an adapter.

    Raises:
        ModelError: The folder holds no readable LoRA adapter, or weights with NaN.
    """
    adapter = open_adapter(path)
    return build_inspection(
        [spectrum for pair in adapter.pairs for spectrum in _compute_pair_spectra(adapter, pair)],
        kind="adapter",
        scaling_rule="alpha/sqrt(r)" if adapter.use_rslora else "alpha/r",
        base_model=adapter.base_model,
        parameters=adapter.trainable_parameters,
        modules_to_save=[key.removeprefix(PEFT_PREFIX) for key in adapter.other_keys if not key.endswith(".alpha")],
        notes=_build_adapter_notes(adapter),
    )


def _build_adapter_notes(adapter: AdapterFolder) -> list[str]:
    """Return notes on patterns without effect, DoRA, and initializations that change the base model."""
    notes: list[str] = []
    if adapter.unused_patterns:
        notes.append(f"patterns that match no module and have no effect: {', '.join(adapter.unused_patterns)}")
    num_expert_parameters = sum(len(pair) > 1 for pair in adapter.pairs)
    if num_expert_parameters:
        notes.append(
            f"{num_expert_parameters} parameters hold experts: one spectrum for each, at the rank of the parameter"
        )
    if adapter.use_dora:
        notes.append("DoRA: the spectra are those of s·B·A, without the magnitudes")
    if (init := adapter.base_changing_init) is not None:
        notes.append(
            f"initialized by {init}, which may change the base model on loading: the figures are those of s·B·A, not of the full update"
        )
    return notes


def _compute_pair_spectra(adapter: AdapterFolder, pair: Sequence[AdapterModule]) -> list[ModuleSpectrum]:
    """Compute the spectra of a pair, and flag experts that no token reached.

    A token gives every direction of B a gradient, and Adam a step of about the learning rate. An expert whose B is zero
    while others moved was therefore never chosen, whereas one that learned nothing has a small update.
    """
    spectra = [_compute_module_spectrum(adapter, module) for module in pair]
    if len(spectra) > 1 and any("untrained" not in spectrum.flags for spectrum in spectra):
        new_flags = [["no_token" if flag == "untrained" else flag for flag in spectrum.flags] for spectrum in spectra]
        spectra = [
            spectrum.model_copy(update={"flags": module_flags})
            for spectrum, module_flags in zip(spectra, new_flags, strict=True)
        ]
    return spectra


def _compute_module_spectrum(adapter: AdapterFolder, module: AdapterModule) -> ModuleSpectrum:
    b, a = adapter.load_factors(module)
    values = abs(module.scaling) * compute_singular_values(b, a)
    # PEFT starts with B = 0 (with A = 0 for an embedding)
    flags = ["untrained"] * (not b.any() or not a.any())
    flags += ["dora"] * (module.magnitude_key is not None) + ["lora_bias"] * (module.bias_key is not None)
    fields = {"name": module.name, "rank": module.rank, "scaling": module.scaling}
    shape = module.rows, module.columns
    return build_spectrum(values, float(np.sum(values**2)), module.kind.name, shape, flags, **fields)


def compute_singular_values(b: Floats, a: Floats) -> Floats:
    """Compute the min(d, r, k) singular values of B·A, padded with zeros to r of them."""
    s = np.linalg.svd(compute_triangle(b) @ compute_triangle(a.T).T, compute_uv=False)
    return np.pad(s, (0, max(0, b.shape[1] - len(s))))


def compute_distance(b: Floats, a: Floats, other_b: Floats, other_a: Floats) -> float:
    """Compute ‖B·A − B'·A'‖_F from the triangles of the concatenated factors."""
    outer, inner = compute_triangle(np.hstack([b, -other_b])), compute_triangle(np.vstack([a, other_a]).T)
    return float(np.linalg.norm(outer @ inner.T))


def compute_triangle(matrix: Floats) -> Floats:
    """Compute R with RᵀR = MᵀM, as a QR decomposition of M [n, r] gives it, in a fifth of its time for well separated columns."""
    gram = matrix.T @ matrix
    norms = np.sqrt(np.diagonal(gram))
    try:
        root = np.linalg.cholesky(gram / np.maximum(np.outer(norms, norms), np.finfo(np.float64).tiny))
        is_separated = bool(np.linalg.norm(np.linalg.inv(root)) ** 2 <= MAX_INVERSE_GRAM)
    except np.linalg.LinAlgError:
        is_separated = False
    triangle: Any = root.T * norms if is_separated else np.linalg.qr(matrix, mode="r")
    return np.asarray(triangle, dtype=np.float64)


def compute_energy_rank(s: Floats, fraction: float, total: float | None = None) -> int | None:
    """Return the smallest number of leading singular values with `fraction` of the energy Σσ²; 0 for the zero matrix.

    If `s` holds only the leading values, `total` is the energy of the full matrix. The result is None if `s` is too short.
    """
    energy = np.cumsum(s**2)
    total_energy = float(energy[-1]) if total is None else total
    if total_energy == 0:
        return 0
    # slack for rounding, so that the whole spectrum reaches 100%
    reached = np.flatnonzero(energy >= fraction * total_energy * (1 - 1e-12))
    return int(reached[0]) + 1 if len(reached) else None


def compute_stable_rank(s: Floats, total: float | None = None) -> float:
    """Return ‖ΔW‖²_F / ‖ΔW‖²_2; 0 for the zero matrix."""
    if len(s) == 0 or s[0] == 0:
        return 0.0
    return float((np.sum(s**2) if total is None else total) / s[0] ** 2)


def compute_effective_rank(s: Floats) -> float:
    """Return exp of the entropy of σ/Σσ (Roy and Vetterli 2007); 0 for the zero matrix."""
    if s.sum() == 0:
        return 0.0
    p = s[s > 0] / s.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def compute_hard_threshold_rank(s: Floats, rows: int, columns: int) -> int:
    """Count the singular values above the optimal hard threshold for unknown noise (Gavish and Donoho 2014).

    `s` must be all min(rows, columns) singular values of a rows × columns matrix: signal plus noise with independent
    entries of one variance. The threshold is ω(β) times their median, with the aspect ratio β. It assumes that fewer than
    half of the singular values are signal. Otherwise the median is signal and the result is too low.
    """
    beta = min(rows, columns) / max(rows, columns)
    # The authors' cubic, off by .02 at most; 2.86 for β = 1.
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return int(np.sum(s > omega * np.median(s)))


def compute_leading_noise_rank(s: Floats, total: float, rows: int, columns: int) -> int:
    """Count the singular values above noise if only the leading ones and the total energy are known.

    The remaining energy is taken as noise. Its variance per entry gives σ, and the threshold for known noise
    applies. This repeats until the count does not change.
    """
    short, long = min(rows, columns), max(rows, columns)
    beta = short / long
    # λ*(β): the threshold in units of σ·sqrt(longer side), for noise of a known σ
    factor = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    count = len(s)
    for _ in range(20):
        noise_energy = max(0.0, total - float(np.sum(s[:count] ** 2)))
        variance = noise_energy / max(1, (rows - count) * (columns - count))
        new_count = int(np.sum(s > factor * math.sqrt(variance * long))) if short > count else count
        if new_count == count:
            break
        count = new_count
    return count


def inspect_checkpoints(base: Path, finetuned: Path, sketch_rank: int = SKETCH_RANK) -> Inspection:
    """Inspect the spectra of `finetuned` minus `base`, with one matrix in memory at a time.

    Raises:
        ModelError: A folder has no safetensors, or the two differ in names or shapes.
    """
    base_checkpoint, tuned_checkpoint = open_checkpoint(base), open_checkpoint(finetuned)
    _require_same_architecture(base_checkpoint, tuned_checkpoint)
    spectra: list[ModuleSpectrum] = []
    not_matrices: list[str] = []
    unchanged = 0
    for name, delta in _iterate_differences(base_checkpoint, tuned_checkpoint):
        if delta is None:
            unchanged += 1
        elif delta.dim() < 2:
            not_matrices.append(name)
        else:
            spectra.append(_compute_matrix_spectrum(name, delta.flatten(1), sketch_rank))
    if not spectra and not not_matrices:
        raise ModelError(f"{finetuned}: every tensor is equal to that of {base}; give a fine-tuned model of this base")
    return build_inspection(
        spectra,
        kind="checkpoints",
        scaling_rule="none",
        base_model=str(base),
        parameters=sum(math.prod(spectrum.shape) for spectrum in spectra),
        unchanged=unchanged,
        not_matrices=not_matrices,
    )


def _require_same_architecture(base_checkpoint: _Checkpoint, tuned_checkpoint: _Checkpoint) -> None:
    """Raise if two checkpoints have different architectures.

    Raises:
        ModelError: Only one of them has a tensor of some name or shape.
    """
    for checkpoint, other_checkpoint in ((base_checkpoint, tuned_checkpoint), (tuned_checkpoint, base_checkpoint)):
        missing = sorted(checkpoint.files.keys() - other_checkpoint.files.keys())
        if missing:
            raise ModelError(
                f"{other_checkpoint.path}: has no tensor {missing[0]} that {checkpoint.path} has ({len(missing)} tensors are missing); give two checkpoints of one architecture"
            )
    for name, shape in base_checkpoint.shapes.items():
        if tuned_checkpoint.shapes[name] != shape:
            raise ModelError(
                f"{name}: {list(shape)} in {base_checkpoint.path} and {list(tuned_checkpoint.shapes[name])} in {tuned_checkpoint.path}; give two checkpoints of one architecture"
            )


def _iterate_differences(
    base_checkpoint: _Checkpoint, tuned_checkpoint: _Checkpoint
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield the change of every floating-point tensor in float32, in the natural order of names; None if nothing changed.

    Raises:
        ModelError: A value is NaN or infinite.
    """
    for name in sorted(base_checkpoint.files, key=natural_sort_key):
        old, new = base_checkpoint.load_tensor(name), tuned_checkpoint.load_tensor(name)
        if not old.is_floating_point():
            continue
        if torch.equal(old, new.to(old.dtype)) and torch.equal(new, old.to(new.dtype)):
            yield name, None
            continue
        delta = new.float() - old.float()
        del old, new
        if not all(torch.isfinite(bound) for bound in torch.aminmax(delta)):  # without the copy that isfinite makes
            raise ModelError(
                f"{name}: NaN or infinite values in {base_checkpoint.path} or {tuned_checkpoint.path}; give an undamaged checkpoint"
            )
        yield name, delta


def _compute_matrix_spectrum(name: str, delta: torch.Tensor, sketch_rank: int) -> ModuleSpectrum:
    """Compute the record of one difference: all singular values up to a shorter side of EXACT_SIDE, else the leading ones."""
    if min(delta.shape) <= EXACT_SIDE:
        tall = delta if delta.shape[0] >= delta.shape[1] else delta.T
        values: Floats = torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R.double()).numpy()
        energy = float(np.sum(values**2))
    else:
        values = _sketch_singular_values(delta, sketch_rank)
        rows = max(1, 2**22 // delta.shape[1])  # at a time, in float64
        blocks = (delta[start : start + rows] for start in range(0, len(delta), rows))
        energy = float(sum(float(block.double().square().sum()) for block in blocks))
    fields: dict[str, Any] = {"name": name.removesuffix(".weight"), "rank": min(delta.shape), "scaling": 1.0}
    return build_spectrum(values, energy, "matrix", (delta.shape[0], delta.shape[1]), **fields)


def _sketch_singular_values(delta: torch.Tensor, rank: int) -> Floats:
    """Compute the leading singular values of `delta` [d, k]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, leading, _ = torch.svd_lowrank(delta, min(rank + OVERSAMPLING, *delta.shape), POWER_ITERATIONS)
    values: Floats = leading[:rank].double().numpy()
    return values


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """Names, files and shapes of a checkpoint's tensors; a tensor is read on access."""

    path: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    def load_tensor(self, name: str) -> torch.Tensor:
        # Closing the file releases its mapped pages, so that memory holds one tensor at a time.
        with safe_open(self.files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


def open_checkpoint(path: Path) -> _Checkpoint:
    """Read the headers of a model folder's tensors.

    Raises:
        ModelError: The folder does not exist, holds no safetensors or only pickled weights, or a shard is missing or damaged.
    """
    if detect_path_kind(path) != "folder":
        raise ModelError(f"{path}: no such folder; give a model folder that save_pretrained wrote")
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in find_shards(path):
        tensors, _ = read_header(shard)
        files |= dict.fromkeys(tensors, shard)
        shapes |= tensors
    return _Checkpoint(path, files, shapes)
