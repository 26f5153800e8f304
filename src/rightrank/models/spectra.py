"""Singular spectra of factored updates, and the ranks that they suggest.

An update is ΔW = s·B·A with B [d, r] and A [r, k]. With B = Q_B R_B and Aᵀ = Q_A R_A, the singular values of B·A are
those of the r × r matrix R_B R_Aᵀ. All arithmetic is in float64.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.integrate import quad
from scipy.optimize import brentq

from rightrank.schema.arrays import Floats

ENERGY_FRACTIONS = (0.9, 0.95, 0.99)
NULL_DRAWS = 200  # fewer for large ranks, where a draw costs more and varies less
NULL_QUANTILE = 0.95


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


@lru_cache(maxsize=256)
def hard_threshold_factor(beta: float) -> float:
    """ω(β) = λ*(β) / sqrt(median of the Marčenko–Pastur law); 2.858 for square matrices."""
    return known_noise_factor(beta) / math.sqrt(_marchenko_pastur_median(beta))


def known_noise_factor(beta: float) -> float:
    """λ*(β): the threshold in units of σ·sqrt(longer side), for noise of a known σ."""
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))


def _marchenko_pastur_median(beta: float) -> float:
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def mass_above(x: float) -> float:
        # the substitution y = low + (high - low)·sin²t removes the square roots at both ends
        def density(t: float) -> float:
            y = low + (high - low) * math.sin(t) ** 2
            return ((high - low) * math.sin(t) * math.cos(t)) ** 2 / (math.pi * beta * y) if y > 0 else 0.0

        start = math.asin(math.sqrt(min(1.0, max(0.0, (x - low) / (high - low)))))
        return float(quad(density, start, math.pi / 2, epsabs=1e-10)[0])

    return float(brentq(lambda x: mass_above(x) - 0.5, low, high, xtol=1e-10))


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


def null_rank(s: Floats, rows: int, columns: int) -> int:
    """The number of singular values above those of random factors of the same shape (Horn's parallel analysis).

    The null is B·A with independent normal entries, scaled so that its median singular value is the one seen; the bound
    is the 95% quantile of its largest. As for the hard threshold, less than half may be signal.
    """
    if len(s) < 2:
        return int(np.sum(s > 0))
    return int(np.sum(s > _null_ratio(rows, columns, len(s)) * np.median(s)))


@lru_cache(maxsize=1024)
def _null_ratio(rows: int, columns: int, rank: int) -> float:
    """The 95% quantile of largest over median singular value of a product of normal factors, from seeded draws."""
    generator = np.random.default_rng([rows, columns, rank])
    ratios: list[float] = []
    for _ in range(max(20, min(NULL_DRAWS, NULL_DRAWS * 32 // rank))):
        core = _random_triangle(generator, rows, rank) @ _random_triangle(generator, columns, rank).T
        s = np.linalg.svd(core, compute_uv=False)[: min(rows, columns, rank)]
        ratios.append(float(s[0] / max(np.median(s), np.finfo(float).tiny)))
    return float(np.quantile(ratios, NULL_QUANTILE))


def _random_triangle(generator: np.random.Generator, rows: int, rank: int) -> Floats:
    """The R factor of a normal [rows, rank] matrix, drawn without the matrix (Bartlett's decomposition)."""
    if rows <= rank:  # the matrix itself: the product has the same singular values
        return np.asarray(generator.standard_normal((rows, rank)))
    triangle = np.triu(generator.standard_normal((rank, rank)), 1)
    diagonal = np.sqrt(generator.chisquare(rows - np.arange(rank)))
    filled: Floats = triangle + np.diag(diagonal)
    return filled
