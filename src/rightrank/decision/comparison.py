"""One comparison: enough, not enough or cannot tell, from the one-sided 95% bounds of a paired difference.

`select`, `resize`, `compare`, the guard, `judge` and `allocate` ask it. A difference is above 0 where something is worse.

    ===========  ===================================
    enough       the upper bound is within the margin
    not enough   the lower bound is not
    cannot tell  otherwise
    ===========  ===================================

Within the margin is at most the margin (`is_within`), for bounds, for means and for bare values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from rightrank.decision.intervals import Estimate, binary_bound, estimate_of_files, normal_quantile
from rightrank.schema.arrays import Floats

CONFIDENCE = 0.95  # of each bound
POWER = 0.8  # with which a planned run settles a comparison
TIE = 1e-9  # of the margin: a difference that exceeds it by rounding alone is within it
MAX_EXAMPLE_GROWTH = 64
MAX_SEEDS = 32


def is_within(difference: float, margin: float) -> bool:
    """Whether a difference, or its bound, is at most the margin, up to rounding."""
    return difference <= margin * (1 + TIE)


@dataclass(frozen=True, slots=True)
class Bounds:
    """A paired difference with its one-sided bounds."""

    mean: float
    low: float
    high: float

    def is_enough(self, margin: float) -> bool | None:
        """True: not worse by more than the margin; False: worse by more; None: cannot tell."""
        if is_within(self.high, margin):
            return True
        return None if is_within(self.low, margin) else False


def bounds_of(estimate: Estimate, confidence: float = CONFIDENCE) -> Bounds:
    return Bounds(estimate.mean, estimate.bound(1 - confidence), estimate.bound(confidence))


def bounds_of_files(sums: Floats, weights: Floats, span: float = 0.0) -> Bounds:
    """The bounds where nothing but two files is compared.

    Args:
        sums: [examples] how much worse one is on each example, times the example's weight.
        weights: [examples] the tokens of each example, or ones.
        span: the range of one example's score; 0 for losses.
    """
    if span and set(np.abs(sums).tolist()) <= {0.0, span} and set(weights.tolist()) == {1.0}:
        worse, better = int((sums > 0).sum()), int((sums < 0).sum())
        low, high = (
            span * binary_bound(*counts, len(sums), CONFIDENCE) for counts in ((better, worse), (worse, better))
        )
        return Bounds(float(sums.mean()), -low, high)
    return bounds_of(estimate_of_files(sums, weights, span))


def examples_needed(
    estimate: Estimate, margin: float, confidence: float = CONFIDENCE, power: float = POWER
) -> int | None:
    """The fewest examples that are expected to settle the difference, rounded up to two digits.

    None if `MAX_EXAMPLE_GROWTH` times as many are not enough, or if examples were not scored one by one.
    """
    if estimate.examples < 2:
        return None
    growth = (1.15**power for power in range(1, 31))
    sizes = (_rounded_up(estimate.examples * factor) for factor in growth if factor <= MAX_EXAMPLE_GROWTH)
    return next((size for size in sizes if settles(estimate.at(size, estimate.seeds), margin, confidence, power)), None)


def seeds_needed(estimate: Estimate, margin: float) -> int | None:
    """The fewest seeds that are expected to settle the difference; None if `MAX_SEEDS` are not enough."""
    sizes = range(estimate.seeds + 1, MAX_SEEDS + 1)
    return next((size for size in sizes if settles(estimate.at(estimate.examples, size), margin)), None)


def settles(estimate: Estimate, margin: float, confidence: float = CONFIDENCE, power: float = POWER) -> bool:
    """Whether such runs tell enough from not enough in this share of cases, if the true mean is the estimated one."""
    error = normal_quantile(power) * estimate.standard_error
    if estimate.mean < margin:
        return is_within(estimate.bound(confidence) + error, margin)
    return not is_within(estimate.bound(1 - confidence) - error, margin)


def _rounded_up(number: float) -> int:
    """Up to two significant digits."""
    step = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return int(math.ceil(number / step) * step)


def walk_down(ranks: Iterable[int], reference: int, holds: Callable[[int], bool]) -> int:
    """The smallest of `ranks` above 0 that the walk from `reference` downward reaches before the first that fails.

    This is a fixed-sequence test: no rank below a failure is tested, and so no correction for multiplicity is needed.
    """
    return min(takewhile(holds, descending(ranks, reference)), default=reference)


def descending(ranks: Iterable[int], reference: int) -> list[int]:
    """The ranks between 0 and `reference`, both excluded, from the top downward."""
    return sorted((rank for rank in ranks if 0 < rank < reference), reverse=True)
