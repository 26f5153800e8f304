"""Bounds of a mean paired difference that hold for heavy tails, for skewed differences and where few examples differ.

Student's t with the degrees of freedom that the variance's own noise leaves, ν = 2n/(κ - 1) for a kurtosis κ (Box 1953, Biometrika 40): n for a normal
distribution, fewer for heavy tails or where few examples differ. The skewness shifts the quantile as in `maths.intervals`, and here only outward: the
skewness of a heavy-tailed sample is mostly noise, and moving a bound inward by it would call too much "not worse".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from rightrank.maths import Floats

MAX_SHIFT = 0.5  # of the quantile


@dataclass(frozen=True, slots=True)
class PairedBounds:
    """The mean difference, and its one-sided lower and upper bounds."""

    mean: float
    low: float
    high: float
    examples: int


def paired_bounds(sums: Floats, weights: Floats, confidence: float) -> PairedBounds:
    """The weighted mean of differences with one-sided bounds of this confidence.

    Args:
        sums: [examples] the difference of each example times its weight.
        weights: [examples] tokens of each, or ones.
        confidence: of each bound.
    """
    count = len(sums)
    mean = float(sums.sum() / weights.sum())
    influence = (sums - weights * mean) / weights.mean()
    second = float(np.mean(influence**2))
    if second == 0.0 or count < 2:
        return PairedBounds(mean, mean, mean, count)
    error = math.sqrt(second / (count - 1))
    kurtosis = float(np.mean(influence**4)) / second**2
    degrees = max(1.0, min(count - 1.0, 2 * count / max(kurtosis - 1, 1e-9)))
    reach = float(stdtrit(degrees, confidence))
    shift = float(np.mean(influence**3)) / second**1.5 * (2 * reach * reach + 1) / (6 * math.sqrt(count))
    shift = max(-MAX_SHIFT * reach, min(MAX_SHIFT * reach, shift))
    return PairedBounds(
        mean, mean - error * (reach + max(0.0, -shift)), mean + error * (reach + max(0.0, shift)), count
    )
