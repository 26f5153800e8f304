"""Compare two adapters or ranks: enough, not enough or cannot tell, from one-sided 95% bounds of a paired difference.

`select`, `resize` and `compare` use it. A difference above 0 is worse.

    ===========  ===================================
    enough       the upper bound is within the margin
    not enough   the lower bound is not
    cannot tell  otherwise
    ===========  ===================================

Within the margin means at most the margin (`is_within`), for bounds, for means and for single values.

The bounds are those of means over two crossed random factors, examples and seeds, in closed form.

If rows form groups (the sentences of a document), groups are sampled rather than rows: every sum below is then over group sums,
their number and their sizes. A group counts by its leverage h as in CR2 (Bell and McCaffrey 2002, "Bias reduction in standard
errors for linear regression with multi-stage samples"), and the degrees of freedom are those of groups with identical rows: there
are few if a few groups hold most rows. Without groups the bounds assume independent rows, and are too narrow if rows are dependent
(benchmarks/README.md, archive).

The model of one score (or of one paired difference) x of seed s and example i is

    x_si = w_i (θ + seed_s) + example_i + interaction_si

with random seeds and examples. The mean's variance is V = V_examples + V_seeds - V_interaction: each of the first two
contains the interaction, so it is subtracted once. Each component is taken at the quantile of its own degrees of freedom. The
skewness of the examples shifts the quantiles as in Hall (1992, "On the removal of skewness by transformation"). A two-way bootstrap
(Owen 2007) covers about as well at thirty to a hundred times the cost.

If exactly two adapters are compared (`estimate_file_difference`), the degrees follow the kurtosis of the examples, and skewness
widens a bound and never narrows it: `benchmarks/compared` shows that these bounds are wrong less often there. No bound of a bounded
score has zero width: if at most three examples differ, the standard error is at least that of the rule of three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from rightrank.schema.metrics import LOSS_KINDS, MetricKind, has_percentages
from rightrank.schema.trials import Floats, Groups

CONFIDENCE = 0.95  # the confidence of each bound
INTERVAL = 2 * CONFIDENCE - 1  # that of the interval between two bounds
TWO_SIDED = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2  # the quantiles of a two-sided interval
POWER = 0.8  # the probability with which a planned run settles a comparison
INDEPENDENCE_NOTE = (
    "Bounds assume independent examples: they are too narrow if several come from one document, prompt or user."
)
RELATIVE_TOLERANCE = 1e-9  # A difference that exceeds the margin only by rounding is within it.
MAX_EXAMPLE_GROWTH = 64
MAX_SEEDS = 32
MAX_DEGREES = 1e6  # Above this the t distribution is treated as normal.
MAX_SKEWNESS_SHIFT = 0.5  # in units of the quantile: the first-order correction must stay small
RULE_OF_THREE = 3 / 1.645  # a standard error times the number of examples: the 95% bound lies 3/n away
MAX_RARE = 3  # The rule of three is wider than the variance of at most so many differing examples.
BISECTIONS = 60
NEWTON_STEPS = 4
NORMAL = NormalDist()
MAX_DEVIATIONS = 10.0  # The tail beyond this is neglected.
# The double exponential rule of Takahasi and Mori (1974) on (-1, 1), for areas that fall steeply at an end.
STEPS = np.arange(-40, 41) / 12
NODES = np.tanh(np.sinh(STEPS) * math.pi / 2)
WEIGHTS = np.cosh(STEPS) / np.cosh(np.sinh(STEPS) * math.pi / 2) ** 2 * math.pi / 24


def format_no_gain(rank: int, gain: float, low: float | None, high: float | None) -> str:
    """Say that a rank is not shown to be better than the base. `gain` and its bounds are in the metric's unit."""
    bounds = "" if low is None or high is None else f" ({INTERVAL:.0%} interval {low:+.2g} to {high:+.2g})"
    return f"No gain shown: rank {rank} gained {gain:+.2g} over the base{bounds}"


def is_within(difference: float, margin: float) -> bool:
    """Return whether a difference or its bound is at most the margin, up to rounding."""
    return difference <= margin * (1 + RELATIVE_TOLERANCE)


@dataclass(frozen=True, slots=True)
class Bounds:
    """A paired difference with its one-sided bounds."""

    mean: float
    low: float
    high: float

    def is_enough(self, margin: float) -> bool | None:
        """Return True if not worse by more than the margin, False if worse by more, None if the bounds cannot tell."""
        if is_within(self.high, margin):
            return True
        return None if is_within(self.low, margin) else False


def compute_bounds(estimate: Estimate) -> Bounds:
    """Compute the one-sided bounds of an estimate."""
    return Bounds(estimate.mean, estimate.compute_bound(1 - CONFIDENCE), estimate.compute_bound(CONFIDENCE))


def compute_file_bounds(
    sums: Floats,
    weights: Floats,
    score_range: float = 0.0,
    groups: Groups | None = None,
) -> Bounds:
    """Compute bounds for a comparison of exactly two adapters.

    Args:
        sums: [examples] how much worse one adapter is on each example, times the example's weight.
        weights: [examples] the tokens of each example, or ones.
        score_range: the range of one example's score; 0 for losses.
        groups: [examples] the group of each example; None: no groups.
    """
    if (
        groups is None
        and score_range
        and set(np.abs(sums).tolist()) <= {0.0, score_range}
        and set(weights.tolist()) == {1.0}
    ):
        worse, better = int((sums > 0).sum()), int((sums < 0).sum())
        low, high = (
            score_range * compute_binary_bound(*counts, len(sums), CONFIDENCE)
            for counts in ((better, worse), (worse, better))
        )
        return Bounds(float(sums.mean()), -low, high)
    return compute_bounds(estimate_file_difference(sums, weights, score_range, groups))


def compute_required_examples(estimate: Estimate, margin: float) -> int | None:
    """Compute about how many examples settle the difference with probability `POWER`, rounded up to two digits.

    The distances of the present bound from the mean, and of a true mean that passes it, shrink with the root of their number.

    Returns None if `MAX_EXAMPLE_GROWTH` times as many are not enough, or if there are no example scores.
    """
    if estimate.examples < 2 or estimate.mean == margin:
        return None
    bound = estimate.compute_bound(CONFIDENCE if estimate.mean < margin else 1 - CONFIDENCE)
    distance = abs(bound - estimate.mean) + NORMAL.inv_cdf(POWER) * estimate.standard_error
    growth = (distance / (margin - estimate.mean)) ** 2
    if growth > MAX_EXAMPLE_GROWTH:
        return None
    size = estimate.examples * growth
    step = 10 ** max(0, math.floor(math.log10(max(size, 1.0))) - 1)
    return int(math.ceil(size / step) * step)


def walk_down(ranks: Iterable[int], reference: int, is_passed: Callable[[int], bool]) -> int:
    """Walk down from `reference` and return the smallest rank above 0 before the first one that fails.

    This is a fixed-sequence test: no rank below a failure is tested, so no correction for multiplicity is needed.
    """
    return min(takewhile(is_passed, list_lower_ranks(ranks, reference)), default=reference)


def list_lower_ranks(ranks: Iterable[int], reference: int) -> list[int]:
    """List the ranks between 0 and `reference`, both excluded, in descending order."""
    return sorted((rank for rank in ranks if 0 < rank < reference), reverse=True)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with the components of its variance, which are variances of the mean over `examples` and `seeds`."""

    mean: float
    examples_variance: float  # 0 without examples
    seeds_variance: float
    interaction_variance: float  # included in both of the above
    examples: int  # independent examples, or groups if there are any
    seeds: int
    seeds_degrees: float  # 0: not measured
    skewness: float  # of the examples' influence
    examples_degrees: float = MAX_DEGREES
    is_pair: bool = (
        False  # whether exactly two adapters are compared; skewness then widens a bound and never narrows it
    )

    @property
    def variance(self) -> float:
        """Return the variance of the mean, at least that of either factor alone."""
        total = self.examples_variance + self.seeds_variance - self.interaction_variance
        return max(total, self.examples_variance, self.seeds_variance, 0.0)

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.variance)

    @property
    def degrees(self) -> float:
        """Return Satterthwaite's degrees of freedom of the summed components."""
        squares = self.examples_variance**2 / self.examples_degrees
        if self.seeds_degrees > 0:
            squares += self.seeds_variance**2 / self.seeds_degrees
        return MAX_DEGREES if squares == 0 else min(MAX_DEGREES, max(1.0, self.variance**2 / squares))

    def compute_bound(self, confidence: float) -> float:
        """Compute the one-sided confidence bound of the true mean: an upper one above one half, a lower one below it.

        Each component of the variance has the quantile of its own degrees of freedom. Satterthwaite's degrees would follow the examples
        where two seeds agree by chance, and the bound would then be too near.
        """
        if self.variance == 0:
            return self.mean
        share = min(1.0, self.seeds_variance / self.variance)
        seed_quantile = compute_t_quantile(self.seeds_degrees or MAX_DEGREES, confidence)
        example_quantile = compute_t_quantile(self.examples_degrees, confidence)
        reach = math.sqrt(share * seed_quantile**2 + (1 - share) * example_quantile**2)
        shift = 0.0
        if self.examples > 1:
            # The distribution over seeds is assumed to be symmetric.
            example_share = float((self.examples_variance / self.variance) ** 1.5)
            shift = example_share * self.skewness * (2 * reach * reach + 1) / (6 * math.sqrt(self.examples))
            shift = max(-MAX_SKEWNESS_SHIFT * reach, min(MAX_SKEWNESS_SHIFT * reach, shift))
        reach = math.copysign(reach, confidence - 0.5)
        if self.is_pair and shift * reach < 0:
            shift = 0.0
        return self.mean + self.standard_error * (reach + shift)

    def replace_seed_variance(self, variance: float, degrees: float) -> Estimate:
        """Return the same mean with another seed variance, such as a pooled or a published one."""
        return replace(self, seeds_variance=variance, seeds_degrees=degrees)


def estimate_mean(
    sums: Floats,
    weights: Floats,
    score_range: float = 0.0,
    groups: Groups | None = None,
) -> Estimate:
    """Estimate the weighted mean over seeds and examples, Σ sums / Σ weights averaged over seeds.

    With one seed the seed variance is 0 with no degrees of freedom, and the caller replaces it (`replace_seed_variance`).

    Args:
        sums: [seeds, examples] the score of each example times its weight, or the difference of two such scores.
        weights: [examples] the tokens of each example, or ones.
        score_range: the range of one example's score; 0 for losses, which have no bound and are equal for equal functions alone.
        groups: [examples] the group of each example, numbered from 0 without gaps; None: no groups.
    """
    seeds, examples = sums.shape
    by_seed = sums.sum(axis=1) / weights.sum()
    mean = float(by_seed.mean())
    seeds_variance = float(by_seed.var(ddof=1)) / seeds if seeds > 1 else 0.0
    if examples < 2:
        return Estimate(mean, 0.0, seeds_variance, 0.0, 0, seeds, seeds - 1.0, 0.0)
    differing = (sums != np.median(sums)).any(axis=0) if score_range else np.zeros(0)
    if groups is not None:
        sums, weights, differing = (
            sum_by_group(values, groups) for values in (sums, weights, differing if score_range else weights)
        )
        examples = len(weights)
    influence = (sums.mean(axis=0) - weights * mean) / weights.mean()
    mean_square = float(np.mean(influence**2))
    free, count = (1.0, examples * (examples - 1)) if groups is None else (1 - weights / weights.sum(), examples**2)
    examples_variance = float((influence**2 / free).sum()) / count
    if score_range and _is_rare(int(np.count_nonzero(differing)), influence):
        examples_variance = max(examples_variance, (RULE_OF_THREE * score_range / examples) ** 2)
    interaction_variance = 0.0
    if seeds > 1:
        residuals = (sums - np.outer(by_seed, weights)) / weights.mean() - influence
        interaction = float((residuals**2 / free).sum()) / ((seeds - 1) * count * seeds)
        interaction_variance = min(interaction, examples_variance, seeds_variance)
    skewness = float(np.mean(influence**3)) / mean_square**1.5 if mean_square > 0 else 0.0
    variances = (examples_variance, seeds_variance, interaction_variance)
    degrees = examples - 1.0 if groups is None else compute_group_degrees(weights)
    return Estimate(mean, *variances, examples, seeds, seeds - 1.0, skewness, degrees)


def sum_by_group(values: Floats, groups: Groups | None) -> Floats:
    """Return [..., groups] sums over the examples of each group, or `values` [..., examples] if there are no groups."""
    if groups is None:
        return values
    sums = np.zeros((int(groups.max()) + 1, *values.shape[:-1]))
    np.add.at(sums, groups, np.moveaxis(values, -1, 0))
    return np.moveaxis(sums, 0, -1)


def compute_group_degrees(weights: Floats) -> float:
    """Compute Satterthwaite's degrees of freedom of the CR2 variance over groups with these weights, whose rows are identical.

    The variance is a quadratic form Σ a_g e_g² with a = 1/(1 - h) and e = (I - h 1ᵀ) S, where Var(S_g) = d_g = weights_g². With C the
    covariance of e, the degrees are (Σ a C_gg)² / Σ a_g a_k C_gk², here in sums over groups. For equal groups they are the number of
    groups minus 1.
    """
    h, d = weights / weights.sum(), weights**2
    a, total_squares = 1 / (1 - h), float((weights**2).sum())
    extra = total_squares * h**2 - 2 * h * d  # C minus the diagonal d is total_squares·hhᵀ - hdᵀ - dhᵀ
    hh, hd, dd = (float((a * pair).sum()) for pair in (h * h, h * d, d * d))
    remainder = 2 * hh * dd + 2 * hd**2 + (total_squares * hh) ** 2 - 4 * total_squares * hh * hd
    squares = float((a**2 * (d**2 + 2 * d * extra)).sum()) + remainder
    return max(1.0, float((a * (d + extra)).sum()) ** 2 / squares)


def compute_score_range(kind: MetricKind, sums: ArrayLike, weights: ArrayLike = 1.0) -> float:
    """Compute the range of one example's score; 0 for losses, which have no bound.

    Args:
        sums: [..., examples] scores times weights.
        weights: [examples]
    """
    if kind in LOSS_KINDS or kind == "perplexity":
        return 0.0
    scores = np.abs(np.divide(sums, weights))
    if kind != "accuracy":
        return float(np.max(scores)) or 1.0
    # Shares of a metric that is no mean over examples may exceed 1 individually, but not on average.
    return (
        100.0
        if has_percentages([float(np.mean(scores))]) or (np.isin(scores, (0, 100)).all() and scores.any())
        else 1.0
    )


def _is_rare(differing: int, influence: Floats) -> bool:
    """Return whether so few examples differ that their own variance is unreliable.

    For shares (`train.metrics.score_macro_f1`) one other prediction moves nearly all examples a little: the number of examples that
    carry the variance decides.
    """
    if differing <= MAX_RARE or 2 * differing <= len(influence):
        return differing <= MAX_RARE
    squares = influence**2
    return float(squares.sum()) ** 2 <= MAX_RARE * float((squares**2).sum())


def estimate_file_difference(
    sums: Floats,
    weights: Floats,
    score_range: float = 0.0,
    groups: Groups | None = None,
) -> Estimate:
    """Estimate one paired difference of two adapters, [examples]; see `estimate_mean`."""
    plain = estimate_mean(sums[None, :], weights, score_range, groups)
    influence = sum_by_group(sums - weights * plain.mean, groups)
    mean_square = float(np.mean(influence**2))
    if mean_square == 0:
        return plain
    kurtosis = float(np.mean(influence**4)) / mean_square**2
    degrees = max(1.0, min(plain.examples_degrees, 2 * plain.examples / max(kurtosis - 1, 1e-9)))
    return replace(plain, examples_degrees=degrees, is_pair=True)


def compute_binary_bound(worse: int, better: int, examples: int, confidence: float) -> float:
    """Compute the one-sided upper bound of a difference of two shares over `examples` pairs.

    It inverts the score test of Tango (1998, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17), whose error is that of the difference under test. If no pair differs it is
    the exact 1 - (1 - confidence)^(1/examples), about 3/examples.

    Args:
        worse: the number of pairs that got worse.
        better: the number of pairs that got better.
    """
    if worse == better == 0:
        return float(1 - (1 - confidence) ** (1 / examples))
    low, high, reach = (worse - better) / examples, 1.0, NORMAL.inv_cdf(confidence)
    observed = low
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        # the standard error if the true difference is the middle, with the other share by maximum likelihood
        b = (2 * examples - worse + better) * middle - worse - better
        c = -better * middle * (1 - middle)
        share = (math.sqrt(max(b * b - 8 * examples * c, 0.0)) - b) / (4 * examples)
        inside = middle - observed < reach * math.sqrt(max(2 * share + middle * (1 - middle), 0.0) / examples)
        low, high = (middle, high) if inside else (low, middle)
    return high


def compute_t_tail(degrees: float, x: float) -> tuple[float, float]:
    """Compute the probability that Student's t exceeds `x` (at least 0), and its density at `x`.

    With x = √degrees · tan(angle) the probability is the area of cos(angle)^(degrees - 1) beyond the angle, over the total area.
    """
    root = math.sqrt(degrees)
    angle, end = math.atan(x / root), min(math.pi / 2, MAX_DEVIATIONS / root)

    def area(start: float) -> float:
        half = (end - start) / 2
        return half * float(WEIGHTS @ np.cos(start + half * (1 + NODES)) ** (degrees - 1))

    total_area = 2 * area(0.0)
    return area(min(angle, end)) / total_area, math.cos(angle) ** (degrees + 1) / (root * total_area)


@lru_cache(maxsize=1024)  # The bounds of a difference share their degrees.
def compute_t_quantile(degrees: float, probability: float) -> float:
    """Compute Student's t at `probability`, to ten digits.

    Newton's method uses the logarithms of tail and x, between which the relation is nearly linear.
    """
    if probability < 0.5:
        return -compute_t_quantile(degrees, 1 - probability)
    normal = NORMAL.inv_cdf(probability)
    x = normal * (1 + (normal**2 + 1) / (4 * degrees))
    for _ in range(NEWTON_STEPS if probability > 0.5 else 0):
        tail, density = compute_t_tail(degrees, x)
        x *= math.exp(math.log(tail / (1 - probability)) * tail / (density * x))
    return x
