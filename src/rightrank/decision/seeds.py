"""The noise over seeds of a paired difference: measured on the seeds that both ranks share, and moderated.

Two or three seeds measure a variance badly. As in limma (Smyth 2004, "Linear models and empirical Bayes methods", SAGMB 3),
the variance of a rank's difference is therefore a weighted mean of its own and of an expected one, by their degrees of
freedom. The expected one is proportional to how much the difference varies between examples: two adapters that treat each
example alike also differ little from seed to seed. The ratio of the two starts at that of earlier grids
(`NOISE`) and follows the other ranks that came out at least as good: how bad a worse rank is, and how noisy, changes no other bound.

With one seed nothing is measured, and no value takes the place of a measurement in an interval. What earlier grids say of the noise (`NOISE`) gives
every rank a probability beside it (`probability_within`), with one seed and with several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rightrank.decision.comparison import CONFIDENCE, MAX_DEGREES, NORMAL, POWER, by_group, t_tail
from rightrank.schema.trials import Floats, Groups

BOOTSTRAP_DRAWS = 2000


def needed_seeds(deviation: float, difference: float) -> int:
    """Seeds of each rank with which a true difference is shown in four of five cases.

    n = 2 (z_.95 + z_.8)² (deviation / difference)², with `deviation` the standard deviation of one training over seeds, in
    the unit of `difference`. It counts no pairing over seeds, and measured on three seeds it is itself known to within a
    factor of two or so.
    """
    return max(1, math.ceil(2 * (_reach() * deviation / difference) ** 2 - 1e-9))


def detectable_difference(deviation: float, seeds: int) -> float:
    """The smallest difference that so many seeds of each rank show in four of five cases."""
    return _reach() * deviation * math.sqrt(2 / seeds)


def _reach() -> float:
    """Standard errors of the test, and of a true difference to pass it."""
    return NORMAL.inv_cdf(CONFIDENCE) + NORMAL.inv_cdf(POWER)


@dataclass(frozen=True, slots=True)
class PairNoise:
    """How one paired difference varies over the seeds that both ranks have, and between examples."""

    variance: float  # over seeds, of the difference of one seed; 0 with one seed
    degrees: float  # seeds - 1
    spread: float  # variance between examples of the difference of one seed; 1 without examples
    likeness: float = (
        1.0  # how many examples of a group count as one: the variance of the mean over that of independent ones
    )

    @property
    def ratio(self) -> float:
        return self.variance / self.spread


@dataclass(frozen=True, slots=True)
class Prior:
    """The seed variance that is expected of a difference, as a ratio to its spread, and the weight of that expectation."""

    ratio: float
    degrees: float

    def moderated(self, pair: PairNoise) -> tuple[float, float]:
        """The variance over seeds of the difference of one seed, and its degrees of freedom."""
        degrees = self.degrees + pair.degrees
        if degrees == 0:
            return 0.0, 0.0
        expected = self.ratio * pair.spread
        return (self.degrees * expected + pair.degrees * pair.variance) / degrees, degrees


@dataclass(frozen=True, slots=True)
class NoiseParts:
    """The variance of a paired difference about that of all seeds and examples, in units of its spread between examples."""

    seeds: float  # of the trained models themselves: shrinks with seeds alone
    crossed: float  # seeds × examples: shrinks with either
    examples: float  # shrinks with examples alone

    def over_seeds(self, examples: float) -> float:
        """Of one seed, about the mean over seeds on the same examples."""
        return self.seeds + self.crossed / examples

    def ratio(self, seeds: int, examples: float) -> float:
        return self.over_seeds(examples) / seeds + self.examples / examples


# Of twelve grids of 400 and 1,500 steps, three seeds each: `benchmarks/selection/noise_model.py`. Trainings of 20 to 80 steps are noisier.
NOISE = NoiseParts(seeds=0.0022, crossed=0.83, examples=0.17)
NOISE_DEGREES = 8.0  # of that expectation for a probability; those grids alone would allow more, and seeds at hand then change it less
BOUND_DEGREES = 0.1  # for a bound, where the seeds at hand are to decide: half a degree let two noisy seeds err in 12%
MIN_EXAMPLES = 64  # for a probability: the grids have 133 or more
WITHIN_DEGREES = 8.0  # how alike the ratios of one run's ranks are: the degrees of their scaled F distribution
BARE_WITHIN_DEGREES = 3.0  # the same for variances that no spread between examples scales
SHARED_REFERENCE = 0.5  # weight of a pair in the ratio at hand: all pairs share the reference's noise


def probability_within(difference: float, variance: float, degrees: float, margin: float) -> float:
    """The probability that the true difference is at most `margin`, from a measured one; every difference is as likely before."""
    deviations = (margin - difference) / math.sqrt(variance)
    beyond, _ = t_tail(degrees, abs(deviations))
    return 1 - beyond if deviations > 0 else beyond


def noise_of_mean(pair: PairNoise, prior: Prior, seeds: int, examples: float) -> tuple[float, float]:
    """The variance of a mean difference about the true one, and its degrees of freedom."""
    variance, degrees = prior.moderated(pair)
    return variance / seeds + NOISE.examples * pair.spread / examples, degrees


def prior_of(others: Sequence[PairNoise], start: Prior, within: float) -> Prior:
    """The expectation for a difference, from earlier grids (`start`) and from the differences of other ranks.

    Args:
        within: how alike the ratios of ranks are, as degrees of freedom; infinite where `start` counts it already.
    """
    measured = [pair for pair in others if pair.degrees > 0 and pair.spread > 0]
    degrees = start.degrees + sum(SHARED_REFERENCE * pair.degrees for pair in measured)
    if degrees == 0:
        return start
    known = sum(SHARED_REFERENCE * pair.degrees * pair.ratio for pair in measured)
    return Prior((start.degrees * start.ratio + known) / degrees, 1 / (1 / within + 1 / degrees))


def pair_noise(sums: Floats, weights: Floats, groups: Groups | None = None) -> PairNoise:
    """The noise of a difference, from its scores [seeds, examples] times their weights [examples]; groups as in `estimate`."""
    seeds, examples = sums.shape
    by_seed = sums.sum(axis=1) / weights.sum()
    variance = float(by_seed.var(ddof=1)) if seeds > 1 else 0.0
    if examples < 2:
        return PairNoise(variance, seeds - 1.0, 1.0)
    influence = (sums - np.outer(by_seed, weights)) / weights.mean()
    squares = float((influence**2).sum())
    likeness = float((by_group(influence, groups) ** 2).sum()) / squares if groups is not None and squares > 0 else 1.0
    return PairNoise(variance, seeds - 1.0, squares / (seeds * (examples - 1)), likeness)


def seed_parts(means: Floats) -> tuple[float, float]:
    """`(common, individual)` variances over seeds of a [ranks, seeds] matrix of means, with two seeds or more.

    `common` is the variance of the seeds' level, which all ranks share. `individual` is the variance of the residuals,
    with (ranks - 1)(seeds - 1) degrees of freedom; a paired difference of two ranks has twice this variance.
    """
    ranks, seeds = means.shape
    level = means.mean(axis=0)
    common = float(level.var(ddof=1))
    if ranks < 2:
        return common, 0.0
    rest = means - means.mean(axis=1, keepdims=True) - level + means.mean()
    return common, float((rest**2).sum()) / ((ranks - 1) * (seeds - 1))


def winners_gap(means: Floats, covariance: Floats, degrees: float = MAX_DEGREES) -> float:
    """The winner's curse: how much better, on average, the best of several noisy means looks than it is.

    With shown means m and noise ε ~ N(0, Σ), the bias of the pick is estimated by the parametric bootstrap as

        gap = -E[ε_J],  J = argmin_j (m_j + ε_j)

    so that m_J + gap is the corrected mean. It grows with the noise and with the number of close candidates: for n equal
    means with independent noise of deviation σ it is σ/√π = .56σ (n = 2) or .85σ (n = 3); for a clear winner it is 0.

    Sources: Smith and Winkler (2006), "The Optimizer's Curse", Management Science 52, for the bias of a selected best;
    Efron and Tibshirani (1993), "An Introduction to the Bootstrap", chapter 10, for its estimate.

    Args:
        means: [n], oriented so that lower is better.
        covariance: [n, n] of their noise.
        degrees: with which the covariance is known. The noise is a multivariate t below `MAX_DEGREES`.
    """
    if len(means) < 2:
        return 0.0
    noise = multivariate_noise(covariance, degrees, BOOTSTRAP_DRAWS)
    picks = np.argmin(means[:, None] + noise, axis=0)
    return max(0.0, -float(noise[picks, np.arange(BOOTSTRAP_DRAWS)].mean()))


def multivariate_noise(covariance: Floats, degrees: float, draws: int) -> Floats:
    """[n, draws] of a multivariate t with mean 0, from a fixed seed; normal from `MAX_DEGREES` on.

    The root of the covariance is Cholesky's. A further row changes none before it, and unlike eigenvectors, which equal variances leave open, it is
    the same on every machine. Where no noise has this covariance, the last rows get some more variance.
    """
    root = np.zeros_like(covariance)
    for row, column in zip(*np.tril_indices(len(root)), strict=True):
        rest, pivot = covariance[row, column] - root[row, :column] @ root[column, :column], root[column, column]
        root[row, column] = math.sqrt(max(rest, 0.0)) if row == column else rest / pivot if pivot > 0 else 0.0
    generator = np.random.default_rng(0x5EED)
    scale = np.sqrt(degrees / generator.chisquare(degrees, draws)) if degrees < MAX_DEGREES else 1.0
    noise: Floats = root @ generator.standard_normal((len(root), draws)) * scale
    return noise
