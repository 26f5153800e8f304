"""The noise over seeds of a paired difference: measured on the seeds that both ranks share, and moderated.

Two or three seeds measure a variance badly. As in limma (Smyth 2004, "Linear models and empirical Bayes methods", SAGMB 3),
the variance of a rank's difference is therefore a weighted mean of its own and of an expected one, by their degrees of
freedom. The expected one is proportional to how much the difference varies between examples: two adapters that treat each
example alike also differ little from seed to seed. The ratio of the two starts at that of earlier grids
(`START`) and follows the ranks at hand. Ranks do not share their variance: a noisy rank hardly widens the bound of a quiet one.

With one seed nothing is measured, and no value takes the place of a measurement in an interval. What earlier grids say of a
further seed is a probability beside it (`probability_within`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr

from rightrank.decision.intervals import normal_quantile
from rightrank.decision.metrics import MetricKind
from rightrank.schema.arrays import Floats

CONFIDENCE, POWER = 0.95, 0.8  # one-sided: of the test, and of a true difference to pass it
REACH = normal_quantile(CONFIDENCE) + normal_quantile(POWER)


def needed_seeds(deviation: float, difference: float) -> int:
    """Seeds of each rank with which a true difference is shown in four of five cases.

    n = 2 (z_.95 + z_.8)² (deviation / difference)², with `deviation` the standard deviation of one training over seeds, in
    the unit of `difference`. It counts no pairing over seeds, and measured on three seeds it is itself known to within a
    factor of two or so.
    """
    return max(1, math.ceil(2 * (REACH * deviation / difference) ** 2 - 1e-9))


def detectable_difference(deviation: float, seeds: int) -> float:
    """The smallest difference that so many seeds of each rank show in four of five cases."""
    return REACH * deviation * math.sqrt(2 / seeds)


@dataclass(frozen=True, slots=True)
class PairNoise:
    """How one paired difference varies over the seeds that both ranks have, and between examples."""

    variance: float  # over seeds, of the difference of one seed; 0 with one seed
    degrees: float  # seeds - 1
    spread: float  # variance between examples of the difference of one seed; 1 without examples

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
        expected = self.ratio * pair.spread
        return (self.degrees * expected + pair.degrees * pair.variance) / degrees, degrees


# The ratio of losses is of two grids of 400 steps (.02 to .09; trainings of 20 to 80 steps have up to .25) and, with its
# degrees, of planted teachers: `benchmarks/decide/seed_coverage.py` names these and judges on others. Few degrees let the
# seeds at hand decide. The ratio of accuracies is of one grid of three seeds.
START = {"loss": Prior(0.1**2, 0.5), "score": Prior(0.08**2, 2.0)}
WITHIN_DEGREES = 8.0  # how alike the ratios of one run's ranks are: the degrees of their scaled F distribution
BARE_WITHIN_DEGREES = 3.0  # the same for variances that no spread between examples scales
RIDGE = 1e-4  # keeps seed effects at 0 where the seeds that rows share do not determine them
SHARED_REFERENCE = 0.5  # weight of a pair in the ratio at hand: all pairs share the reference's noise


# A further seed's difference is the one seen plus RATIO times the spread between examples times a Student's t of so few degrees.
# Fitted on eight sources of open grids, each predicted by the others: `benchmarks/selection/one_seed.py`.
FURTHER_SEED_RATIO, FURTHER_SEED_DEGREES = 0.17, 2.0
MIN_EXAMPLES = 64  # the grids that fit it have 96 or more


def probability_within(difference: float, spread: float, margin: float) -> float:
    """The probability that the difference of a further seed is at most `margin`, from that of one seed.

    Args:
        spread: the variance between examples of the paired difference; above 0.
    """
    return float(stdtr(FURTHER_SEED_DEGREES, (margin - difference) / (FURTHER_SEED_RATIO * math.sqrt(spread))))


def start_of(kind: MetricKind) -> Prior:
    """The ratio of earlier grids, before any seed of the run is seen."""
    return START["loss" if kind in ("token_loss", "loss", "perplexity") else "score"]


def prior_of(pairs: Sequence[PairNoise], kind: MetricKind, *, has_examples: bool) -> Prior | None:
    """The expectation for the ranks at hand; None without a pair of two seeds, where nothing is measured."""
    measured = [pair for pair in pairs if pair.degrees > 0 and pair.spread > 0]
    if not measured:
        return None
    start = start_of(kind) if has_examples else Prior(0.0, 0.0)
    weights = [SHARED_REFERENCE * pair.degrees for pair in measured]
    degrees = start.degrees + sum(weights)
    known = sum(weight * pair.ratio for weight, pair in zip(weights, measured, strict=True))
    within = WITHIN_DEGREES if has_examples else BARE_WITHIN_DEGREES
    return Prior((start.degrees * start.ratio + known) / degrees, 1 / (1 / within + 1 / degrees))


def pair_noise(sums: Floats, weights: Floats) -> PairNoise:
    """The noise of a difference, from its scores [seeds, examples] times their weights [examples]."""
    seeds, examples = sums.shape
    by_seed = sums.sum(axis=1) / weights.sum()
    variance = float(by_seed.var(ddof=1)) if seeds > 1 else 0.0
    if examples < 2:
        return PairNoise(variance, seeds - 1.0, 1.0)
    influence = (sums - np.outer(by_seed, weights)) / weights.mean()
    return PairNoise(variance, seeds - 1.0, float((influence**2).sum()) / (seeds * (examples - 1)))


def adjusted_means(losses: Sequence[Mapping[int, float]]) -> list[float]:
    """The mean of each row (seed → loss), as if all rows had all seeds.

    Rows are compared on the seeds that they share: the least-squares fit of loss = row + seed, with seed effects that sum
    to 0. Rows without a seed in common keep their plain means.
    """
    seeds = sorted({seed for row in losses for seed in row})
    if all(len(row) == len(seeds) for row in losses):
        return [float(np.mean(list(row.values()))) for row in losses]
    cells = [(place, seeds.index(seed), loss) for place, row in enumerate(losses) for seed, loss in row.items()]
    level = float(np.mean([loss for _, _, loss in cells]))
    design = np.zeros((len(cells) + len(seeds), len(losses) + len(seeds)))
    target = np.zeros(len(design))
    for number, (place, seed, loss) in enumerate(cells):
        design[number, place] = design[number, len(losses) + seed] = 1.0
        target[number] = loss - level
    design[len(cells) :, len(losses) :] = RIDGE * np.eye(len(seeds))
    solution = np.linalg.lstsq(design, target, rcond=None)[0]
    return [float(row) + level for row in solution[: len(losses)]]


def best_learning_rate(
    losses: Mapping[float, Mapping[int, float]], is_surely_lower: Callable[[float, float], bool]
) -> float:
    """The learning rate with the lowest mean (losses by seed), compared on shared seeds; the lower one on ties.

    Those with the most seeds are compared first. One with fewer seeds replaces the best of them only where
    `is_surely_lower(one, best)` on the seeds that both have, so that a lucky seed does not.
    """
    most = max(len(by_seed) for by_seed in losses.values())
    leaders = [lr for lr in sorted(losses) if len(losses[lr]) == most]
    means = dict(zip(leaders, adjusted_means([losses[lr] for lr in leaders]), strict=True))
    best = min(leaders, key=lambda lr: (means[lr], lr))
    for lr in sorted(losses.keys() - means.keys(), key=lambda lr: (-len(losses[lr]), lr)):
        if losses[lr].keys() & losses[best].keys() and is_surely_lower(lr, best):
            best = lr
    return best
