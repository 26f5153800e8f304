"""The record of a module from its singular values, and the summary of the records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np

from rightrank.maths import Floats, spectra
from rightrank.records.probe import InspectionSummary, ModuleKind, ModuleSpectrum

DEAD_FRACTION = 1e-3  # of the median norm of the modules
ROUNDING = 1e-6  # of the largest singular value; below it a value is rounding of float32 files, and not noise
MIN_VALUES_FOR_NOISE = 8  # the median of fewer singular values does not estimate noise
SENTENCE = (
    "A spectrum describes where an update's energy is; it does not say which rank is enough: "
    "held-out data decide (rightrank resize --data, rightrank select)."
)


@dataclass(frozen=True, slots=True)
class Update:
    """One module's ΔW, with its known singular values."""

    name: str
    kind: ModuleKind
    shape: tuple[int, int]
    rank: int
    scaling: float
    values: Floats  # singular values, descending; all of them unless `energy` exceeds the sum of their squares
    energy: float  # ‖ΔW‖²_F
    parameters: int
    base_spectral_norm: float | None = None
    flags: tuple[str, ...] = ()


def describe(update: Update) -> ModuleSpectrum:
    s, total = update.values, update.energy
    partial = update.kind == "matrix" and len(s) < min(update.shape)
    flags = list(update.flags)
    if partial:
        flags.append("partial_spectrum")
    noise, null = _ranks_above_noise(update, partial)
    if s.any() and not partial and (2 * noise >= len(s) or len(s) < MIN_VALUES_FOR_NOISE):
        flags.append("noise_unclear")  # the median may be signal
    return ModuleSpectrum(
        name=update.name,
        kind=update.kind,
        shape=update.shape,
        rank=update.rank,
        scaling=update.scaling,
        singular_values=[float(value) for value in s],
        frobenius_norm=float(np.sqrt(total)),
        spectral_norm=float(s[0]) if len(s) else 0.0,
        stable_rank=spectra.stable_rank(s, total),
        effective_rank=None if partial else spectra.effective_rank(s),
        energy_rank={f"{part:g}": spectra.energy_rank(s, part, total) for part in spectra.ENERGY_FRACTIONS},
        noise_rank=noise,
        null_rank=null,
        base_spectral_norm=update.base_spectral_norm,
        flags=flags,
    )


def _ranks_above_noise(update: Update, partial: bool) -> tuple[int, int | None]:
    """Ranks by the hard threshold, and by random factors of the same shape.

    The noise of an adapter is assumed in the r × r core that its factors span, that of a matrix in all entries.
    """
    s, (rows, columns) = update.values, update.shape
    if not s.any():
        return 0, 0
    s = np.where(s > ROUNDING * s[0], s, 0.0)
    if update.kind != "matrix":
        return spectra.hard_threshold_rank(s, len(s), len(s)), spectra.null_rank(s, rows, columns)
    if partial:
        return spectra.leading_noise_rank(s, update.energy, rows, columns), None
    return spectra.hard_threshold_rank(s, rows, columns), None


def flag_dead(modules: Sequence[ModuleSpectrum]) -> list[ModuleSpectrum]:
    """The records with the flag `dead` on every module with a norm below DEAD_FRACTION of the median."""
    norms = [module.frobenius_norm for module in modules if module.frobenius_norm > 0]
    limit = DEAD_FRACTION * median(norms) if norms else 0.0
    return [
        module.model_copy(update={"flags": [*module.flags, "dead"]})
        if module.frobenius_norm < limit and not {"untrained", "no_token"} & set(module.flags)
        else module
        for module in modules
    ]


@dataclass(frozen=True, slots=True)
class InspectionInfo:
    """What the summary states beside the figures of the modules."""

    kind: Literal["adapter", "checkpoints", "gradient"]
    scaling_rule: str
    base_model: str | None
    parameters: int
    modules_to_save: tuple[str, ...] = ()
    unchanged: int = 0
    not_matrices: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def summarise(modules: Sequence[ModuleSpectrum], about: InspectionInfo) -> InspectionSummary:
    alive = [module for module in modules if module.frobenius_norm > 0]
    known = [module for module in alive if module.effective_rank is not None]
    by_use = sorted(known, key=lambda module: (module.effective_rank or 0.0) / module.rank)
    return InspectionSummary(
        kind=about.kind,
        modules=len(modules),
        parameters=about.parameters,
        ranks=sorted({module.rank for module in modules}),
        scaling_rule=about.scaling_rule,
        base_model=about.base_model,
        energy_rank={f"{part:g}": _largest(modules, f"{part:g}") for part in spectra.ENERGY_FRACTIONS},
        median_effective_rank=median([module.effective_rank or 0.0 for module in known]) if known else None,
        most_concentrated=by_use[0].name if by_use else None,
        least_concentrated=by_use[-1].name if by_use else None,
        untrained=[module.name for module in modules if "untrained" in module.flags],
        dead=[module.name for module in modules if "dead" in module.flags],
        modules_to_save=list(about.modules_to_save),
        unchanged=about.unchanged,
        not_matrices=list(about.not_matrices),
        notes=list(about.notes),
        sentence=SENTENCE,
    )


def _largest(modules: Sequence[ModuleSpectrum], part: str) -> int | None:
    ranks = [module.energy_rank[part] for module in modules]
    known = [rank for rank in ranks if rank is not None]
    return max(known, default=0) if len(known) == len(ranks) else None
