"""One module's factors at another rank: optimal truncation, or padding that changes nothing.

The scale is folded: with s the scale as it was and s' the one that PEFT will apply at the new rank, s'·B'·A' is the best
approximation of s·B·A of that rank (Eckart and Young 1936), and its error is the discarded energy.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rightrank.maths.spectra import Svd, factored_svd

Floats = NDArray[np.float64]

NOTHING = 1e-12  # of the largest singular value: below it a direction is rounding, and its B is kept at zero


def resized_factors(b: Floats, a: Floats, rank: int, scale_ratio: float) -> tuple[Floats, Floats]:
    """`(B' [d, rank], A' [rank, k])` with B'·A' = scale_ratio · B·A, truncated or padded; scale_ratio is s/s'.

    At the same rank the factors stay as they are, but for the ratio in B.
    """
    present = b.shape[1]
    if rank == present:
        return b * scale_ratio, a
    if rank > present:
        return padded_factors(b * scale_ratio, a, rank)
    if not b.any() or not a.any():
        return b[:, :rank] * scale_ratio, a[:rank]  # untrained: stays as it was begun
    return balanced_factors(factored_svd(b, a), rank, scale_ratio)


def balanced_factors(svd: Svd, rank: int, scale_ratio: float) -> tuple[Floats, Floats]:
    """The leading part of an SVD with the square root of each singular value on either side."""
    kept = min(rank, len(svd.s))
    s = svd.s[:kept] * abs(scale_ratio)
    root = np.sqrt(s)
    alive = s > NOTHING * (s[0] if kept else 0.0)
    b = svd.u[:, :kept] * np.where(alive, root, 0.0) * math.copysign(1.0, scale_ratio)
    # A direction without weight keeps a row of A, so that further training can use it.
    a = svd.vt[:kept] * np.where(alive, root, root[0] if kept else 0.0)[:, None]
    return padded_factors(b, a, rank)


def padded_factors(b: Floats, a: Floats, rank: int) -> tuple[Floats, Floats]:
    """Zero columns of B against rows of A as PEFT draws them, uniform in ±1/sqrt(k): the product is the same."""
    missing = rank - b.shape[1]
    if missing == 0:
        return b, a
    width = a.shape[1]
    rows = np.random.default_rng([rank, width]).uniform(-1, 1, (missing, width)) / math.sqrt(width)
    return np.hstack([b, np.zeros((b.shape[0], missing))]), np.vstack([a, rows])
