"""Singular spectra of factored updates, and the ranks that they suggest.

An update is ΔW = s·B·A with B [d, r] and A [r, k]. With B = Q_B R_B and Aᵀ = Q_A R_A, the singular values of B·A are
those of the r × r matrix R_B R_Aᵀ. All arithmetic is in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rightrank.schema.arrays import Floats

ENERGY_FRACTIONS = (0.9, 0.95, 0.99)


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
    return int(np.sum(s > hard_threshold_factor(min(rows, columns) / max(rows, columns)) * np.median(s)))


def hard_threshold_factor(beta: float) -> float:
    """ω(β), for noise of unknown size; 2.86 for square matrices. The authors' cubic, off by .02 at most."""
    return 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43


def known_noise_factor(beta: float) -> float:
    """λ*(β): the threshold in units of σ·sqrt(longer side), for noise of a known σ."""
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))


def leading_noise_rank(s: Floats, total: float, rows: int, columns: int) -> int:
    """The same if only the leading singular values and the whole energy are known.

    The energy that the kept values leave is taken as noise; its variance per entry gives σ, and the threshold for known noise
    applies. This repeats until the count stays the same.
    """
    short, long = min(rows, columns), max(rows, columns)
    factor = known_noise_factor(short / long)
    count = len(s)
    for _ in range(20):
        rest = max(0.0, total - float(np.sum(s[:count] ** 2)))
        variance = rest / max(1, (rows - count) * (columns - count))
        kept = int(np.sum(s > factor * math.sqrt(variance * long))) if short > count else count
        if kept == count:
            break
        count = kept
    return count
