"""The record of a module from its singular values, and the summary of the records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from rightrank.models import spectra
from rightrank.models.adapter_files import AdapterFolder, AdapterModule, open_adapter
from rightrank.models.lora_files import PREFIX, is_alpha
from rightrank.models.spectra import factored_singular_values
from rightrank.schema.arrays import Floats
from rightrank.schema.results import Inspection, InspectionSummary, ModuleSpectrum

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
    kind: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    values: Floats  # singular values, descending; all of them unless `energy` exceeds the sum of their squares
    energy: float  # ‖ΔW‖²_F
    parameters: int
    flags: tuple[str, ...] = ()


def _describe(update: Update) -> ModuleSpectrum:
    s, total = update.values, update.energy
    partial = update.kind == "matrix" and len(s) < min(update.shape)
    flags = list(update.flags)
    if partial:
        flags.append("partial_spectrum")
    noise = _rank_above_noise(update, partial)
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
        flags=flags,
    )


def _rank_above_noise(update: Update, partial: bool) -> int:
    """The rank by the hard threshold.

    The noise of an adapter is assumed in the r × r core that its factors span, that of a matrix in all entries.
    """
    s, (rows, columns) = update.values, update.shape
    if not s.any():
        return 0
    s = np.where(s > ROUNDING * s[0], s, 0.0)
    if update.kind != "matrix":
        return spectra.hard_threshold_rank(s, len(s), len(s))
    if partial:
        return spectra.leading_noise_rank(s, update.energy, rows, columns)
    return spectra.hard_threshold_rank(s, rows, columns)


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


def inspection_of(updates: Sequence[Update], **about: Any) -> Inspection:
    """The records of the updates and their summary; `about` are the summary's other fields."""
    modules = _flag_dead([_describe(update) for update in updates])
    energy: dict[str, int | None] = {}
    for part in (f"{fraction:g}" for fraction in spectra.ENERGY_FRACTIONS):
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
    updates = [update for pair in adapter.pairs for update in _updates(adapter, pair)]
    return inspection_of(
        updates,
        kind="adapter",
        scaling_rule=adapter.scaling_rule,
        base_model=adapter.base_model,
        parameters=adapter.trained,
        modules_to_save=[key.removeprefix(PREFIX) for key in adapter.other_keys if not is_alpha(key)],
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


def _updates(adapter: AdapterFolder, pair: Sequence[AdapterModule]) -> list[Update]:
    """The updates of a pair; of several experts, those that no token reached are flagged so.

    A token gives every direction of B a gradient, and Adam a step of about the learning rate. So an expert whose B is zero
    beside others that moved was never chosen, whereas one that learned nothing has an update that is small.
    """
    found = [_update(adapter, module) for module in pair]
    if len(found) > 1 and any("untrained" not in update.flags for update in found):
        found = [
            replace(update, flags=tuple("no_token" if flag == "untrained" else flag for flag in update.flags))
            for update in found
        ]
    return found


def _update(adapter: AdapterFolder, module: AdapterModule) -> Update:
    b, a = adapter.factors(module)
    values = abs(module.scaling) * factored_singular_values(b, a)
    flags = []
    # PEFT starts with B = 0 (with A = 0 for an embedding)
    if not b.any() or not a.any():
        flags.append("untrained")
    if module.magnitude_key is not None:
        flags.append("dora")
    if module.bias_key is not None:
        flags.append("lora_bias")
    return Update(
        name=module.name,
        kind=module.kind,
        shape=(module.rows, module.columns),
        rank=module.rank,
        scaling=module.scaling,
        values=values,
        energy=float(np.sum(values**2)),
        parameters=module.parameters,
        flags=tuple(flags),
    )
