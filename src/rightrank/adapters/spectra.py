"""Compute singular spectra of updates, the ranks that they suggest, and the records of `inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rightrank.adapters.adapter_files import AdapterFolder, AdapterModule, open_adapter
from rightrank.adapters.adapter_folders import PEFT_PREFIX, find_base_changing_init
from rightrank.adapters.truncation import compute_singular_values, use_one_thread
from rightrank.schema.results import Inspection, InspectionSummary, ModuleSpectrum
from rightrank.schema.trials import Floats

ENERGY_FRACTIONS = (0.9, 0.95, 0.99)
ROUNDING = 1e-6  # relative to the largest singular value; a value below it is rounding of float32 files, and not noise
MIN_VALUES_FOR_NOISE = 8  # the median of fewer singular values does not estimate noise
SQUARE_THRESHOLD = 2.86  # 2.858 for square matrices, by the cubic .56 − .95 + 1.82 + 1.43
SENTENCE = (
    "A spectrum describes where an update's energy is; it does not say which rank is enough: "
    "held-out data decide (rightrank resize --data, rightrank select)."
)


def inspect_adapter(path: Path) -> Inspection:
    """Inspect the spectra of an adapter.

    Raises:
        ModelError: The folder holds no readable LoRA adapter, or weights with NaN.
    """
    adapter = open_adapter(path)
    with use_one_thread():
        modules = [spectrum for pair in adapter.pairs for spectrum in _compute_pair_spectra(adapter, pair)]
    summary = InspectionSummary(
        modules=len(modules),
        parameters=adapter.trainable_parameters,
        ranks=sorted({module.rank for module in modules}),
        base_model=adapter.base_model,
        energy_rank={
            fraction: max(module.energy_rank[fraction] for module in modules) for fraction in map(str, ENERGY_FRACTIONS)
        },
        untrained=[module.name for module in modules if "untrained" in module.flags],
        modules_to_save=[key.removeprefix(PEFT_PREFIX) for key in adapter.other_keys if not key.endswith(".alpha")],
        notes=_build_adapter_notes(adapter),
        sentence=SENTENCE,
    )
    return Inspection(modules=modules, summary=summary)


def _build_adapter_notes(adapter: AdapterFolder) -> list[str]:
    notes: list[str] = []
    if adapter.config.get("use_dora"):
        notes.append("DoRA: the spectra are those of s·B·A, without the magnitudes")
    if (init := find_base_changing_init(adapter.config)) is not None:
        notes.append(
            f"initialized by {init}, which may change the base model on loading: the figures are those of s·B·A, not of the full update"
        )
    return notes


def _compute_pair_spectra(adapter: AdapterFolder, pair: Sequence[AdapterModule]) -> list[ModuleSpectrum]:
    """Compute the spectra of a pair, and flag experts that no token reached.

    A token gives every direction of B a gradient, and Adam a step of about the learning rate. An expert whose B is zero
    while others moved was therefore never chosen, whereas one that learned nothing has a small update.
    """
    factors = adapter.load_pair_factors(pair[0])
    # PEFT starts with B = 0 (with A = 0 for an embedding)
    is_untrained = [not b.any() or not a.any() for b, a in factors]
    first_flag = "untrained" if all(is_untrained) else "no_token"
    return [
        _compute_module_spectrum(module, b, a, [first_flag] * is_unmoved)
        for module, (b, a), is_unmoved in zip(pair, factors, is_untrained, strict=True)
    ]


def _compute_module_spectrum(module: AdapterModule, b: Floats, a: Floats, flags: list[str]) -> ModuleSpectrum:
    values = abs(module.scaling) * compute_singular_values(b, a)
    noise_rank = (
        compute_hard_threshold_rank(np.where(values > ROUNDING * values[0], values, 0.0)) if values.any() else 0
    )
    flags += ["dora"] * (module.magnitude_key is not None) + ["lora_bias"] * (module.bias_key is not None)
    # The median may be signal.
    is_unclear = values.any() and (2 * noise_rank >= len(values) or len(values) < MIN_VALUES_FOR_NOISE)
    flags += ["noise_unclear"] * bool(is_unclear)
    return ModuleSpectrum(
        name=module.name,
        kind=module.kind,
        shape=(module.rows, module.columns),
        rank=module.rank,
        scaling=module.scaling,
        singular_values=values.tolist(),
        frobenius_norm=float(np.sqrt(np.sum(values**2))),
        spectral_norm=float(values[0]),
        stable_rank=compute_stable_rank(values),
        effective_rank=compute_effective_rank(values),
        energy_rank={str(fraction): compute_energy_rank(values, fraction) for fraction in ENERGY_FRACTIONS},
        noise_rank=noise_rank,
        flags=flags,
    )


def compute_energy_rank(s: Floats, fraction: float) -> int:
    """Return the smallest number of leading singular values with `fraction` of the energy Σσ²; 0 for the zero matrix."""
    energy = np.cumsum(s**2)
    if energy[-1] == 0:
        return 0
    # slack for rounding, so that the whole spectrum reaches 100%
    return int(np.flatnonzero(energy >= fraction * energy[-1] * (1 - 1e-12))[0]) + 1


def compute_stable_rank(s: Floats) -> float:
    """Return ‖ΔW‖²_F / ‖ΔW‖²_2; 0 for the zero matrix."""
    return float(np.sum(s**2) / s[0] ** 2) if s[0] else 0.0


def compute_effective_rank(s: Floats) -> float:
    """Return exp of the entropy of σ/Σσ (Roy and Vetterli 2007); 0 for the zero matrix."""
    if s.sum() == 0:
        return 0.0
    p = s[s > 0] / s.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def compute_hard_threshold_rank(s: Floats) -> int:
    """Count the singular values above the optimal hard threshold for unknown noise (Gavish and Donoho 2014).

    The noise of an adapter is assumed in the r × r core that its factors span, so `s` are the values of a square matrix: signal plus
    noise with independent entries of one variance. The threshold is 2.86 times their median, by the authors' cubic. It assumes that fewer
    than half of the singular values are signal. Otherwise the median is signal and the result is too low.
    """
    return int(np.sum(s > SQUARE_THRESHOLD * np.median(s)))
