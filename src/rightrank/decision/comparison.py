"""One comparison: enough, not enough or cannot tell, from the one-sided 95% bounds of a paired difference.

`select`, `resize` and `compare` ask it. A difference is above 0 where something is worse.

    ===========  ===================================
    enough       the upper bound is within the margin
    not enough   the lower bound is not
    cannot tell  otherwise
    ===========  ===================================

Within the margin is at most the margin (`is_within`), for bounds, for means and for bare values.

The bounds are of means over two crossed random factors, examples and seeds, in closed form.

Where rows belong together (the sentences of a document), the groups are drawn, and not their rows: every sum below is then over
the sums of groups, of their number and their sizes. A group counts by its leverage h as in CR2 (Bell and McCaffrey 2002, "Bias
reduction in standard errors for linear regression with multi-stage samples"), and the degrees of freedom are those of groups whose rows
are fully alike: they are few where a few groups hold most rows. Without groups the bounds take rows as independent, and are too near where
they are not (docs/explanation/science.md, archive).

The model of one score (or of one paired difference) x of seed s and example i is

    x_si = w_i (θ + seed_s) + example_i + interaction_si

with random seeds and examples. The mean's variance is V = V_examples + V_seeds - V_interaction: each of the first two
contains the interaction, so it is subtracted once. Each part is taken at the quantile of its own degrees of freedom. The skewness of
the examples shifts the quantiles as in Hall (1992, "On the removal of skewness by transformation"). A two-way bootstrap (Owen
2007) covers about as well at thirty to a hundred times the cost.

Where nothing but two files is compared (`estimate_of_files`), the degrees follow the kurtosis of the examples, and skewness widens a
bound and never narrows it: `benchmarks/compared` shows that these bounds err less often there. No bound of a bounded score has
zero width: where at most three examples differ, the standard error is at least that of the rule of three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, takewhile
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from rightrank.schema.metrics import LOSS_KINDS, MetricKind, is_percent
from rightrank.schema.trials import Floats, Groups

CONFIDENCE = 0.95  # of each bound
TWO_SIDED = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2  # the quantiles of a two-sided interval
POWER = 0.8  # with which a planned run settles a comparison
INDEPENDENT = (
    "Bounds take examples as independent: where several are of one document, prompt or user, they are too narrow."
)
TIE = 1e-9  # of the margin: a difference that exceeds it by rounding alone is within it
MAX_EXAMPLE_GROWTH = 64
MAX_SEEDS = 32
MAX_DEGREES = 1e6  # beyond it the t distribution is normal
MAX_SKEWNESS_SHIFT = 0.5  # of the quantile: the correction is of first order and must stay small
RULE_OF_THREE = 3 / 1.645  # a standard error times the number of examples: the 95% bound lies 3/n away
MAX_RARE = 3  # examples that differ, up to which the rule of three is wider than their own variance
BISECTIONS = 60
NEWTON_STEPS = 4
NORMAL = NormalDist()
MAX_DEVIATIONS = 10.0  # beyond which a tail counts as nothing
# The double exponential rule of Takahasi and Mori (1974) on (-1, 1), for areas that fall steeply at an end.
STEPS = np.arange(-40, 41) / 12
NODES = np.tanh(np.sinh(STEPS) * math.pi / 2)
WEIGHTS = np.cosh(STEPS) / np.cosh(np.sinh(STEPS) * math.pi / 2) ** 2 * math.pi / 24


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


def bounds_of(estimate: Estimate) -> Bounds:
    return Bounds(estimate.mean, estimate.bound(1 - CONFIDENCE), estimate.bound(CONFIDENCE))


def bounds_of_files(sums: Floats, weights: Floats, span: float = 0.0, groups: Groups | None = None) -> Bounds:
    """The bounds where nothing but two files is compared.

    Args:
        sums: [examples] how much worse one is on each example, times the example's weight.
        weights: [examples] the tokens of each example, or ones.
        span: the range of one example's score; 0 for losses.
        groups: [examples] which of them belong together; None: each stands for itself.
    """
    if groups is None and span and set(np.abs(sums).tolist()) <= {0.0, span} and set(weights.tolist()) == {1.0}:
        worse, better = int((sums > 0).sum()), int((sums < 0).sum())
        low, high = (
            span * binary_bound(*counts, len(sums), CONFIDENCE) for counts in ((better, worse), (worse, better))
        )
        return Bounds(float(sums.mean()), -low, high)
    return bounds_of(estimate_of_files(sums, weights, span, groups))


def examples_needed(estimate: Estimate, margin: float) -> int | None:
    """The fewest examples that are expected to settle the difference, rounded up to two digits.

    None if `MAX_EXAMPLE_GROWTH` times as many are not enough, or if examples were not scored one by one.
    """
    if estimate.examples < 2:
        return None
    factors = (1.15**power for power in count(1))
    for factor in takewhile(lambda factor: factor <= MAX_EXAMPLE_GROWTH, factors):
        step = 10 ** max(0, math.floor(math.log10(estimate.examples * factor)) - 1)
        size = int(math.ceil(estimate.examples * factor / step) * step)
        if settles(estimate.at(size, estimate.seeds), margin):
            return size
    return None


def seeds_needed(estimate: Estimate, margin: float) -> int | None:
    """The fewest seeds that are expected to settle the difference; None if `MAX_SEEDS` are not enough."""
    sizes = range(estimate.seeds + 1, MAX_SEEDS + 1)
    return next((size for size in sizes if settles(estimate.at(estimate.examples, size), margin)), None)


def settles(estimate: Estimate, margin: float) -> bool:
    """Whether such runs tell enough from not enough with a chance of `POWER`, if the true mean is the estimated one."""
    error = NORMAL.inv_cdf(POWER) * estimate.standard_error
    if estimate.mean < margin:
        return is_within(estimate.bound(CONFIDENCE) + error, margin)
    return not is_within(estimate.bound(1 - CONFIDENCE) - error, margin)


def walk_down(ranks: Iterable[int], reference: int, holds: Callable[[int], bool]) -> int:
    """The smallest of `ranks` above 0 that the walk from `reference` downward reaches before the first that fails.

    This is a fixed-sequence test: no rank below a failure is tested, and so no correction for multiplicity is needed.
    """
    return min(takewhile(holds, descending(ranks, reference)), default=reference)


def descending(ranks: Iterable[int], reference: int) -> list[int]:
    """The ranks between 0 and `reference`, both excluded, from the top downward."""
    return sorted((rank for rank in ranks if 0 < rank < reference), reverse=True)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with the parts of its variance, which are those of the mean over `examples` and `seeds`."""

    mean: float
    examples_variance: float  # 0 without examples
    seeds_variance: float
    interaction_variance: float  # contained in both of the above
    examples: int  # independent ones: groups, where rows belong together
    seeds: int
    seeds_degrees: float
    skewness: float  # of the examples' influence
    kurtosis: float | None = None  # of the examples' influence, where two files are compared
    is_apart: bool = (
        False  # whether the seed part was replaced (`with_seeds`), and counts at its own degrees of freedom
    )
    grouped_degrees: float | None = None  # of groups, which have fewer where a few hold most rows

    @property
    def examples_degrees(self) -> float:
        return self.examples - 1.0 if self.grouped_degrees is None else self.grouped_degrees

    @property
    def variance(self) -> float:
        """The variance of the mean, at least that of either factor alone."""
        whole = self.examples_variance + self.seeds_variance - self.interaction_variance
        return max(whole, self.examples_variance, self.seeds_variance, 0.0)

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.variance)

    @property
    def degrees(self) -> float:
        """Satterthwaite's degrees of freedom of the sum of the parts; of two files, those of a variance of this kurtosis."""
        if self.kurtosis is not None:
            return max(1.0, min(self.examples_degrees, 2 * self.examples / max(self.kurtosis - 1, 1e-9)))
        squares = 0.0
        if self.examples > 1:
            squares += self.examples_variance**2 / self.examples_degrees
        if self.seeds_degrees > 0:
            squares += self.seeds_variance**2 / self.seeds_degrees
        if self.examples > 1 and self.seeds > 1:
            squares += self.interaction_variance**2 / (self.examples_degrees * (self.seeds - 1))
        return MAX_DEGREES if squares <= 0 else float(min(MAX_DEGREES, max(1.0, self.variance**2 / squares)))

    def bound(self, confidence: float) -> float:
        """The one-sided confidence bound of the true mean: an upper one above one half, a lower one below it."""
        reach, shift = self._reach(confidence), 0.0
        if self.examples > 1 and self.variance > 0:
            # the distribution over seeds is taken as symmetric
            share = float((self.examples_variance / self.variance) ** 1.5)
            shift = share * self.skewness * (2 * reach * reach + 1) / (6 * math.sqrt(self.examples))
            shift = max(-MAX_SKEWNESS_SHIFT * abs(reach), min(MAX_SKEWNESS_SHIFT * abs(reach), shift))
        if self.kurtosis is not None and shift * reach < 0:
            shift = 0.0
        return self.mean + self.standard_error * (reach + shift)

    def _reach(self, confidence: float) -> float:
        """Standard errors to the bound; with a seed part of its own, each part of the variance at the quantile of its own degrees of freedom.

        Satterthwaite's degrees are those of examples where two seeds came out alike by chance, and the bound would then be too near.
        """
        if not self.is_apart or self.seeds_degrees <= 0 or self.variance <= 0:
            return t_quantile(self.degrees, confidence)
        of_seeds = t_quantile(self.seeds_degrees, confidence)
        of_examples = t_quantile(self.examples_degrees, confidence) if self.examples > 1 else 0.0
        share = min(1.0, self.seeds_variance / self.variance)
        return math.copysign(math.sqrt(share * of_seeds**2 + (1 - share) * of_examples**2), of_seeds)

    def with_seeds(self, variance: float, degrees: float) -> Estimate:
        """The same mean with another seed variance, such as a pooled or a published one."""
        return replace(self, seeds_variance=variance, seeds_degrees=degrees, is_apart=True)

    def of_a_further_seed(self) -> Estimate:
        """The estimate of the difference that one further seed shows: the seed part times 1 + seeds."""
        return replace(self, seeds_variance=self.seeds_variance * (1 + self.seeds))

    def at(self, examples: int, seeds: int) -> Estimate:
        """The estimate that a run of another size is expected to give: the same mean, with each part of the variance scaled."""
        example_ratio = self.examples / examples if self.examples > 1 and examples > 0 else 1.0
        seed_ratio = self.seeds / seeds
        pure_examples = max(self.examples_variance - self.interaction_variance, 0.0) * example_ratio
        pure_seeds = max(self.seeds_variance - self.interaction_variance, 0.0) * seed_ratio
        both = self.interaction_variance * example_ratio * seed_ratio
        degrees = self.seeds_degrees
        if degrees > 0:
            degrees = max(degrees + seeds - self.seeds, 1.0)
        grouped = None if self.grouped_degrees is None else max(1.0, self.grouped_degrees / example_ratio)
        return replace(
            self,
            examples_variance=pure_examples + both,
            seeds_variance=pure_seeds + both,
            interaction_variance=both,
            examples=examples,
            seeds=seeds,
            seeds_degrees=degrees,
            grouped_degrees=grouped,
        )


def estimate(sums: Floats, weights: Floats, span: float = 0.0, groups: Groups | None = None) -> Estimate:
    """The weighted mean over seeds and examples, Σ sums / Σ weights averaged over seeds.

    With one seed the seed variance is 0 with no degrees of freedom, and the caller replaces it (`with_seeds`).

    Args:
        sums: [seeds, examples] the score of each example times its weight, or the difference of two such scores.
        weights: [examples] the tokens of each example, or ones.
        span: the range of one example's score; 0 for losses, which have no bound and are equal for equal functions alone.
        groups: [examples] which of them belong together, by numbers from 0 without gaps; None: each stands for itself.
    """
    seeds, examples = sums.shape
    by_seed = sums.sum(axis=1) / weights.sum()
    mean = float(by_seed.mean())
    seeds_variance = float(by_seed.var(ddof=1)) / seeds if seeds > 1 else 0.0
    if examples < 2:
        return Estimate(mean, 0.0, seeds_variance, 0.0, 0, seeds, float(seeds - 1), 0.0)
    differing = (sums != np.median(sums)).any(axis=0) if span else np.zeros(0)
    if groups is not None:
        sums, weights, differing = (
            by_group(values, groups) for values in (sums, weights, differing if span else weights)
        )
        examples = len(weights)
    influence = (sums.mean(axis=0) - weights * mean) / weights.mean()
    spread = float(np.mean(influence**2))
    free, count = (1.0, examples * (examples - 1)) if groups is None else (1 - weights / weights.sum(), examples**2)
    examples_variance = float((influence**2 / free).sum()) / count
    if span and _is_rare(int(np.count_nonzero(differing)), influence):
        examples_variance = max(examples_variance, (RULE_OF_THREE * span / examples) ** 2)
    interaction_variance = 0.0
    if seeds > 1:
        rest = (sums - np.outer(by_seed, weights)) / weights.mean() - influence
        of_both = float((rest**2 / free).sum()) / ((seeds - 1) * count * seeds)
        interaction_variance = min(of_both, examples_variance, seeds_variance)
    skewness = float(np.mean(influence**3)) / spread**1.5 if spread > 0 else 0.0
    parts = (examples_variance, seeds_variance, interaction_variance)
    grouped = None if groups is None else degrees_of_groups(weights)
    return Estimate(mean, *parts, examples, seeds, float(seeds - 1), skewness, grouped_degrees=grouped)


def by_group(values: Floats, groups: Groups | None) -> Floats:
    """[..., groups] sums over the examples that belong together; `values` [..., examples] where each stands for itself."""
    if groups is None:
        return values
    sums = np.zeros((int(groups.max()) + 1, *values.shape[:-1]))
    np.add.at(sums, groups, np.moveaxis(values, -1, 0))
    return np.moveaxis(sums, 0, -1)


def degrees_of_groups(weights: Floats) -> float:
    """Satterthwaite's degrees of freedom of the CR2 variance over groups of these weights, whose rows are fully alike.

    The variance is a quadratic form Σ a_g e_g² with a = 1/(1 - h) and e = (I - h 1ᵀ) S, where Var(S_g) = d_g = weights_g². With C the
    covariance of e, the degrees are (Σ a C_gg)² / Σ a_g a_k C_gk², here in sums over groups. Of equal groups they are their number less 1.
    """
    h, d = weights / weights.sum(), weights**2
    a, whole = 1 / (1 - h), float((weights**2).sum())
    extra = whole * h**2 - 2 * h * d  # C less the diagonal d is whole·hhᵀ - hdᵀ - dhᵀ
    hh, hd, dd = (float((a * pair).sum()) for pair in (h * h, h * d, d * d))
    rest = 2 * hh * dd + 2 * hd**2 + (whole * hh) ** 2 - 4 * whole * hh * hd
    squares = float((a**2 * (d**2 + 2 * d * extra)).sum()) + rest
    return max(1.0, float((a * (d + extra)).sum()) ** 2 / squares)


def span_of(kind: MetricKind, sums: ArrayLike, weights: ArrayLike = 1.0) -> float:
    """The range of one example's score; 0 for losses, which have no bound.

    Args:
        sums: [..., examples] scores times weights.
        weights: [examples]
    """
    if kind in LOSS_KINDS or kind == "perplexity":
        return 0.0
    scores = np.abs(np.divide(sums, weights))
    if kind != "accuracy":
        return float(np.max(scores)) or 1.0
    # shares of a metric that is no mean of examples exceed 1 one by one, but not on average
    return 100.0 if is_percent([float(np.mean(scores))]) or (np.isin(scores, (0, 100)).all() and scores.any()) else 1.0


def _is_rare(differing: int, influence: Floats) -> bool:
    """Whether so few examples differ that their own variance says too little.

    Of shares (`train.metrics.macro_f1`) one other prediction moves nearly all of them a little: what counts is how many carry the variance.
    """
    if differing <= MAX_RARE or 2 * differing <= len(influence):
        return differing <= MAX_RARE
    squares = influence**2
    return float(squares.sum()) ** 2 <= MAX_RARE * float((squares**2).sum())


def estimate_of_files(sums: Floats, weights: Floats, span: float = 0.0, groups: Groups | None = None) -> Estimate:
    """The estimate of one paired difference of two files, [examples]; see `estimate`."""
    plain = estimate(sums[None, :], weights, span, groups)
    influence = by_group(sums - weights * plain.mean, groups)
    spread = float(np.mean(influence**2))
    return replace(plain, kurtosis=float(np.mean(influence**4)) / spread**2) if spread > 0 else plain


def binary_bound(worse: int, better: int, examples: int, confidence: float) -> float:
    """The one-sided upper bound of a difference of two shares, of `examples` pairs of which so many differ each way.

    It inverts the score test of Tango (1998, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17), whose error is that of the difference under test. Where no pair differs it is
    the exact 1 - (1 - confidence)^(1/examples), about 3/examples.
    """
    if worse == better == 0:
        return float(1 - (1 - confidence) ** (1 / examples))
    low, high, reach = (worse - better) / examples, 1.0, NORMAL.inv_cdf(confidence)
    observed = low
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        # the standard error where the true difference is the middle: the other share by maximum likelihood
        b = (2 * examples - worse + better) * middle - worse - better
        c = -better * middle * (1 - middle)
        share = (math.sqrt(max(b * b - 8 * examples * c, 0.0)) - b) / (4 * examples)
        inside = middle - observed < reach * math.sqrt(max(2 * share + middle * (1 - middle), 0.0) / examples)
        low, high = (middle, high) if inside else (low, middle)
    return high


def t_tail(degrees: float, x: float) -> tuple[float, float]:
    """The probability that Student's t exceeds `x`, which is not below 0, and its density at `x`.

    With x = √degrees · tan(angle) the probability is the area of cos(angle)^(degrees - 1) beyond the angle, over the whole area.
    """
    root = math.sqrt(degrees)
    angle, end = math.atan(x / root), min(math.pi / 2, MAX_DEVIATIONS / root)

    def area(start: float) -> float:
        half = (end - start) / 2
        return half * float(WEIGHTS @ np.cos(start + half * (1 + NODES)) ** (degrees - 1))

    whole = 2 * area(0.0)
    return area(min(angle, end)) / whole, math.cos(angle) ** (degrees + 1) / (root * whole)


@lru_cache(maxsize=1024)  # the bounds of a difference share their degrees
def t_quantile(degrees: float, probability: float) -> float:
    """Student's t at `probability`, to ten digits: Newton's method where tail and x are logarithms, between which it is nearly a line."""
    if probability < 0.5:
        return -t_quantile(degrees, 1 - probability)
    normal = NORMAL.inv_cdf(probability)
    x = normal * (1 + (normal**2 + 1) / (4 * degrees))
    for _ in range(NEWTON_STEPS if probability > 0.5 else 0):
        tail, density = t_tail(degrees, x)
        x *= math.exp(math.log(tail / (1 - probability)) * tail / (density * x))
    return x
