"""The noise over seeds of a paired difference, measured on shared seeds and moderated, and what it says about several ranks at once.

Two or three seeds measure a variance badly. As in limma (Smyth 2004, "Linear models and empirical Bayes methods", SAGMB 3),
the variance of a rank's difference is therefore a weighted mean of its own and of an expected one, by their degrees of
freedom. The expected one is proportional to the variance of the difference between examples: two adapters that treat each
example similarly also differ little from seed to seed. The ratio of the two starts at that of earlier grids
(`NOISE`) and follows the other ranks that came out at least as good, so a worse or noisier rank changes no other bound.

With one seed nothing is measured, and no value replaces a measurement in an interval. The noise of earlier grids (`NOISE`) gives
every rank a probability besides, with one seed and with several: from the joint distribution of the ranks' true means given the measured
ones (`sample_joint_noise`). Its prior is flat. Its noise is a multivariate t, drawn from a fixed seed of its own, whose covariance has the variances
of all paired differences. The level that all ranks share cancels in every difference and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rightrank.decision.comparison import CONFIDENCE, MAX_DEGREES, NORMAL, POWER, sum_by_group
from rightrank.schema.metrics import LOSS_KINDS, MetricKind
from rightrank.schema.trials import Floats, Groups

BOOTSTRAP_DRAWS = 2000
DRAWS = 10_000  # of the joint distribution: a probability is known to .005


def compute_needed_seeds(deviation: float, difference: float) -> int:
    """Compute the seeds of each rank with which a true difference is shown in four of five cases.

    n = 2 (z_.95 + z_.8)² (deviation / difference)², with `deviation` the standard deviation of one training over seeds, in
    the unit of `difference`. Pairing over seeds is not counted. A deviation measured on three seeds is itself known to within a
    factor of about two.
    """
    return max(1, math.ceil(2 * (_compute_power_quantile() * deviation / difference) ** 2 - 1e-9))


def compute_detectable_difference(deviation: float, seeds: int) -> float:
    """Compute the smallest difference that this many seeds of each rank show in four of five cases."""
    return _compute_power_quantile() * deviation * math.sqrt(2 / seeds)


def _compute_power_quantile() -> float:
    """Return the standard errors of the test, plus those of a true difference that passes it."""
    return NORMAL.inv_cdf(CONFIDENCE) + NORMAL.inv_cdf(POWER)


@dataclass(frozen=True, slots=True)
class PairNoise:
    """The variance of one paired difference over shared seeds and between examples."""

    variance: float  # over seeds, of the difference of one seed; 0 with one seed
    degrees: float  # seeds - 1
    example_variance: float  # variance between examples of the difference of one seed; 1 without examples
    design_effect: float = 1.0  # the variance of the mean divided by that of independent examples

    @property
    def ratio(self) -> float:
        return self.variance / self.example_variance


@dataclass(frozen=True, slots=True)
class Prior:
    """The expected seed variance of a difference as a ratio to its variance between examples, and the weight of that expectation."""

    ratio: float
    degrees: float

    def moderate(self, pair: PairNoise) -> tuple[float, float]:
        """Return the moderated variance over seeds of the difference of one seed, and its degrees of freedom."""
        degrees = self.degrees + pair.degrees
        if degrees == 0:
            return 0.0, 0.0
        expected = self.ratio * pair.example_variance
        return (self.degrees * expected + pair.degrees * pair.variance) / degrees, degrees


@dataclass(frozen=True, slots=True)
class NoiseComponents:
    """Components of the variance of a paired difference, in units of its variance between examples."""

    seeds: float  # of the trained models: shrinks only with seeds
    crossed: float  # seeds × examples: shrinks with either
    examples: float  # shrinks only with examples
    learning_rates: float = 0.0  # of the choice of each rank's learning rate: shrinks with neither

    def compute_seed_ratio(self, examples: float) -> float:
        """Return the variance of one seed about the mean over seeds on the same examples."""
        return self.seeds + self.crossed / examples

    def compute_ratio(self, seeds: int, examples: float) -> float:
        """Return the variance of a mean over this many seeds and examples."""
        return self.compute_seed_ratio(examples) / seeds + self.examples / examples + self.learning_rates


# From twelve grids of 400 and 1,500 steps with three seeds each: `benchmarks/selection/noise_model.py`. Trainings of 20 to 80 steps are noisier.
NOISE = NoiseComponents(seeds=0.0022, crossed=0.83, examples=0.17)
# Of losses; accuracies show none. A best learning rate of one seed is often not that of another: `benchmarks/decide/probability.py`.
LOSS_NOISE = replace(NOISE, learning_rates=0.016)
NOISE_DEGREES = 8.0  # of that expectation for a probability; the grids alone would allow more, but then the present seeds would change it less
BOUND_DEGREES = (
    0.1  # for a bound, which the present seeds should decide: with half a degree, two noisy seeds are wrong in 12%
)
WITHIN_DEGREES = 8.0  # how similar the ratios of one run's ranks are: the degrees of their scaled F distribution
BARE_WITHIN_DEGREES = 3.0  # the same for variances that are not relative to a variance between examples
SHARED_REFERENCE = 0.5  # weight of a pair in the pooled ratio: all pairs share the reference's noise


def get_noise(kind: MetricKind) -> NoiseComponents:
    """Return the noise of a difference between ranks by this kind of metric."""
    return LOSS_NOISE if kind in LOSS_KINDS or kind == "perplexity" else NOISE


def pool_prior(other_pairs: Sequence[PairNoise], initial_prior: Prior, rank_degrees: float) -> Prior:
    """Pool the expectation of earlier grids (`initial_prior`) with the differences of other ranks.

    Args:
        rank_degrees: how similar the ratios of ranks are, as degrees of freedom; infinite if `initial_prior` includes it.
    """
    measured = [pair for pair in other_pairs if pair.degrees > 0 and pair.example_variance > 0]
    degrees = initial_prior.degrees + sum(SHARED_REFERENCE * pair.degrees for pair in measured)
    if degrees == 0:
        return initial_prior
    weighted_ratios = sum(SHARED_REFERENCE * pair.degrees * pair.ratio for pair in measured)
    return Prior(
        (initial_prior.degrees * initial_prior.ratio + weighted_ratios) / degrees, 1 / (1 / rank_degrees + 1 / degrees)
    )


def measure_pair_noise(sums: Floats, weights: Floats, groups: Groups | None = None) -> PairNoise:
    """Measure the noise of a difference from [seeds, examples] scores times their weights [examples]; groups as in `estimate_mean`."""
    seeds, examples = sums.shape
    by_seed = sums.sum(axis=1) / weights.sum()
    variance = float(by_seed.var(ddof=1)) if seeds > 1 else 0.0
    if examples < 2:
        return PairNoise(variance, seeds - 1.0, 1.0)
    influence = (sums - np.outer(by_seed, weights)) / weights.mean()
    squares = float((influence**2).sum())
    likeness = (
        float((sum_by_group(influence, groups) ** 2).sum()) / squares if groups is not None and squares > 0 else 1.0
    )
    return PairNoise(variance, seeds - 1.0, squares / (seeds * (examples - 1)), likeness)


def sample_multivariate_noise(covariance: Floats, degrees: float, draws: int) -> Floats:
    """Draw [n, draws] of a multivariate t with mean 0 from a fixed seed; normal from `MAX_DEGREES` on.

    The root of the covariance is Cholesky's. An additional row changes none before it, and unlike eigenvectors, which are not unique for
    equal variances, it is the same on every machine. If no noise has this covariance, the last rows get some more variance.
    """
    root = np.zeros_like(covariance)
    for row, column in zip(*np.tril_indices(len(root)), strict=True):
        remainder, pivot = covariance[row, column] - root[row, :column] @ root[column, :column], root[column, column]
        root[row, column] = math.sqrt(max(remainder, 0.0)) if row == column else remainder / pivot if pivot > 0 else 0.0
    generator = np.random.default_rng(0x5EED)
    scale = np.sqrt(degrees / generator.chisquare(degrees, draws)) if degrees < MAX_DEGREES else 1.0
    noise: Floats = root @ generator.standard_normal((len(root), draws)) * scale
    return noise


def sample_joint_noise(variances: Floats, degrees: float) -> Floats:
    """Draw [ranks, draws] of the noise of measured means, each minus that of the first rank.

    Ranks are in order from best to worst, so that a worse one changes no draw of the others.

    Args:
        variances: [ranks, ranks] of each paired difference. If no covariance has all of them, some of them become larger.
        degrees: the degrees of freedom of the variances.
    """
    covariance = (variances[0] + variances[:, :1] - variances) / 2
    return sample_multivariate_noise(covariance, degrees, DRAWS)
