"""Intervals of means over two crossed random factors, items and seeds, in closed form.

The model of one score (or of one paired difference) x of seed s and item i is

    x_si = w_i (θ + seed_s) + item_i + both_si

with random seeds and items. The mean's variance is V = V_items + V_seeds - V_both: each of the two margins counts the
interaction once, so it is taken off once. Degrees of freedom follow Satterthwaite (1946); the skewness of the items
shifts the quantiles as in Hall (1992, "On the removal of skewness by transformation"). A two-way bootstrap
(Owen 2007) covers about as well at thirty to a hundred times the cost; `benchmarks/decide` has both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtr, stdtrit

Floats = NDArray[np.float64]

MOST_DEGREES = 1e6  # beyond it t and normal are the same
LARGEST_SHIFT = 0.5  # of the quantile: the skewness correction is first order and must stay small


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with the parts of its variance. `seeds` and `items` are the counts that the parts belong to."""

    mean: float
    items_variance: float  # of the mean, from items: 0 where there are none
    seeds_variance: float  # of the mean, from seeds
    both_variance: float  # of the mean, from the interaction: in both of the above
    items: int
    seeds: int
    seeds_degrees: float
    skewness: float  # of the items' influence

    @property
    def variance(self) -> float:
        """Of the mean. Never below either margin less the interaction that it shares with the other."""
        whole = self.items_variance + self.seeds_variance - self.both_variance
        return max(whole, self.items_variance, self.seeds_variance, 0.0)

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.variance)

    @property
    def degrees(self) -> float:
        """Satterthwaite's, of the sum of the parts."""
        squares = 0.0
        if self.items > 1:
            squares += self.items_variance**2 / (self.items - 1)
        if self.seeds_degrees > 0:
            squares += self.seeds_variance**2 / self.seeds_degrees
        if self.items > 1 and self.seeds > 1:
            squares += self.both_variance**2 / ((self.items - 1) * (self.seeds - 1))
        return MOST_DEGREES if squares <= 0 else float(min(MOST_DEGREES, max(1.0, self.variance**2 / squares)))

    def bound(self, confidence: float) -> float:
        """The one-sided bound that the true mean stays below with this confidence (above, if it is under one half)."""
        return self.mean + self.standard_error * self._reach(confidence)

    def _reach(self, confidence: float) -> float:
        reach: float = float(stdtrit(self.degrees, confidence))
        if self.items < 2 or self.variance <= 0:
            return reach
        share = float((self.items_variance / self.variance) ** 1.5)  # seeds are taken as symmetric
        shift = share * self.skewness * (2 * reach * reach + 1) / (6 * math.sqrt(self.items))
        return reach + max(-LARGEST_SHIFT * abs(reach), min(LARGEST_SHIFT * abs(reach), shift))

    def probability_below(self, value: float) -> float:
        """How sure it is that the true mean is below `value`; a step where nothing varies."""
        if self.standard_error == 0:
            return float(self.mean < value)
        return float(stdtr(self.degrees, (value - self.mean) / self.standard_error))

    def with_seeds(self, variance: float, degrees: float) -> Estimate:
        """The same with another estimate of what the seeds add: a pooled or a published one."""
        return replace(self, seeds_variance=variance, seeds_degrees=degrees)

    def reversed(self) -> Estimate:
        """Of the difference the other way round."""
        return replace(self, mean=-self.mean, skewness=-self.skewness)

    def at(self, items: int, seeds: int) -> Estimate:
        """What a run of that size is expected to give: the same mean, each part of the variance scaled."""
        item_ratio = self.items / items if self.items > 1 and items > 0 else 1.0
        seed_ratio = self.seeds / seeds
        pure_items = max(self.items_variance - self.both_variance, 0.0) * item_ratio
        pure_seeds = max(self.seeds_variance - self.both_variance, 0.0) * seed_ratio
        both = self.both_variance * item_ratio * seed_ratio
        degrees = self.seeds_degrees
        if self.seeds > 1 and seeds > 1:
            degrees = degrees * (seeds - 1) / (self.seeds - 1)
        return Estimate(self.mean, pure_items + both, pure_seeds + both, both, items, seeds, degrees, self.skewness)


def estimate(sums: Floats, weights: Floats) -> Estimate:
    """The weighted mean over seeds and items.

    `sums` is [seeds, items]: each item's score summed over its tokens (or its own score), or a difference of two;
    `weights` is [items]: its tokens (or ones). The mean is that of Σ sums / Σ weights over seeds. With one seed the
    seeds' part is 0 and has no degrees of freedom: the caller must put something in its place.
    """
    seeds, items = sums.shape
    by_seed = sums.sum(axis=1) / weights.sum()
    mean = float(by_seed.mean())
    seeds_variance = float(by_seed.var(ddof=1)) / seeds if seeds > 1 else 0.0
    if items < 2:
        return Estimate(mean, 0.0, seeds_variance, 0.0, 0, seeds, float(seeds - 1), 0.0)
    influence = (sums.mean(axis=0) - weights * mean) / weights.mean()
    items_variance = float((influence**2).sum()) / (items * (items - 1))
    both_variance = 0.0
    if seeds > 1:
        rest = (sums - np.outer(by_seed, weights)) / weights.mean() - influence
        both_variance = float((rest**2).sum()) / ((seeds - 1) * (items - 1) * items * seeds)
    both_variance = min(both_variance, items_variance, seeds_variance)
    return Estimate(
        mean,
        items_variance,
        seeds_variance,
        both_variance,
        items,
        seeds,
        float(seeds - 1),
        _skewness(influence),
    )


def _skewness(influence: Floats) -> float:
    spread = float(np.mean(influence**2))
    return float(np.mean(influence**3)) / spread**1.5 if spread > 0 else 0.0


def seed_parts(means: Floats) -> tuple[float, float]:
    """`(common, own)` variances over seeds of a [ranks, seeds] matrix of means, two or more seeds.

    `common` is the variance of the seeds' own level, shared by all ranks; `own` that of what is left, with
    (ranks - 1)(seeds - 1) degrees of freedom: a paired difference of two ranks has twice that variance.
    """
    ranks, seeds = means.shape
    level = means.mean(axis=0)
    common = float(level.var(ddof=1))
    if ranks < 2:
        return common, 0.0
    rest = means - means.mean(axis=1, keepdims=True) - level + means.mean()
    return common, float((rest**2).sum()) / ((ranks - 1) * (seeds - 1))


def winners_gap(means: Floats, covariance: Floats, draws: int = 2000) -> float:
    """How optimistic the best of several noisy means is, in the mean: E[true value of the pick] - E[its shown value].

    `means` [n] are oriented so that lower is better, `covariance` [n, n] is of their noise. A parametric bootstrap
    from the means themselves, the same draws each time; 0 for one candidate.
    """
    if len(means) < 2:
        return 0.0
    generator = np.random.default_rng(0x5EED)
    noise = generator.multivariate_normal(np.zeros(len(means)), covariance, size=draws, method="eigh")
    picks = np.argmin(means + noise, axis=1)
    return max(0.0, -float(noise[np.arange(draws), picks].mean()))


def two_sided(confidence: float) -> tuple[float, float]:
    """The quantiles of a two-sided interval: `(0.025, 0.975)` for 0.95."""
    return (1 - confidence) / 2, (1 + confidence) / 2


def normal_quantile(probability: float) -> float:
    return float(ndtri(probability))
