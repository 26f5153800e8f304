"""The evidence in a table: the mean of each rank, its paired difference from the reference, and whether it is enough.

The data decide which variation an interval covers (`Evidence.basis`):

    examples and seeds  examples and seeds vary: the closed form of two crossed factors
    examples            one seed: the examples are measured, and the noise over seeds is unknown
    seeds               one number a training, two or more trainings at a rank
    std                 one number a rank with a stated standard deviation
    values              one number a rank and no deviation: no interval

Ranks and learning rates are compared on the seeds that they share: the value of a rank is the one that it would have with the seeds of
all ranks, so values, differences and bounds agree. A single seed gives an indication: its intervals exclude
the noise over seeds.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np

from rightrank.decision.comparison import (
    CONFIDENCE,
    MAX_DEGREES,
    NORMAL,
    POWER,
    Estimate,
    estimate_mean,
    is_within,
    sum_by_group,
    walk_down,
)
from rightrank.decision.table import (
    Contender,
    MetricUnit,
    Pair,
    ScoreTable,
    align_contenders,
    compute_differences,
    estimate_pairs,
    find_outliers,
    pair_cells,
    select_contender,
)
from rightrank.schema.metrics import LOSS_KINDS, Margin, MetricKind, compute_default_margin, compute_margin
from rightrank.schema.results import Basis
from rightrank.schema.trials import Floats, Groups

MAX_EQUAL_ERRORS = 2.0  # A rank within so many standard errors of the best is treated as equally good.


class Evidence:
    """The statistical evidence in a table, in the oriented unit: lower is better, nats for a perplexity."""

    def __init__(self, table: ScoreTable, noise: NoiseComponents | None = None) -> None:
        """Collect the evidence of a table. `noise` is that of earlier grids; None for that of the table's metric."""
        outliers = find_outliers(table)
        excluded = {(outlier.rank, outlier.learning_rate, outlier.seed) for outlier in outliers}
        table = replace(table, cells={key: cell for key, cell in table.cells.items() if key not in excluded})
        self.table = table
        self.noise = noise or get_noise(table.kind)
        self.contenders = align_contenders([select_contender(table, rank) for rank in table.list_ranks()])
        # Of the compared learning rates. The others change nothing.
        self.outliers = [
            outlier for outlier in outliers if self.contenders[outlier.rank].learning_rate == outlier.learning_rate
        ]
        self.base = select_contender(table, 0) if table.get_cells_by_rate(0) else None
        self.reference = min(self.contenders.values(), key=lambda contender: (contender.loss, contender.rank))

    @cached_property
    def unit(self) -> MetricUnit:
        """Return the conversion to the metric's unit."""
        unit = MetricUnit(self.table.kind, self.table.higher_is_better, 0.0)
        return replace(unit, reference=unit.convert_value(self.reference.loss))

    def resolve_margin(self, margin: Margin | None, base_loss: float | None = None) -> float:
        """Return the margin in the metric's unit.

        Args:
            base_loss: the oriented value of the base, if the table has none.
        """
        base_loss = self.base.loss if self.base is not None else base_loss
        gain = None if base_loss is None else self.unit.convert_difference(base_loss - self.reference.loss)
        return compute_margin(margin, self.table.kind, self.unit.reference, self._list_values(), gain)

    def _list_values(self) -> list[float]:
        return [cell.value for cell in self.table.cells.values()]

    def convert_margin(self, margin: Margin | None, base_loss: float | None = None) -> float:
        """Return the margin in the oriented unit."""
        return self.unit.convert_margin(self.resolve_margin(margin, base_loss))

    @property
    def margin_without_base(self) -> float:
        """Return the gain that one number must have over another to count as one, in the oriented unit."""
        return self.unit.convert_margin(
            compute_default_margin(self.table.kind, self.unit.reference, self._list_values())
        )

    def is_within(self, rank: int, margin: float) -> bool:
        """Return whether the value of the rank is within the margin (oriented unit) of the reference; False without a result."""
        return rank in self.contenders and is_within(self.contenders[rank].loss - self.reference.loss, margin)

    def pick_by_values(self, margin: float) -> int:
        """Walk down from the reference by values alone, and return the last rank within the margin before the first that is not."""
        return walk_down(self.contenders, self.reference.rank, lambda rank: self.is_within(rank, margin))

    @cached_property
    def basis(self) -> Basis:
        seeds = max(len(contender.cells) for contender in self.contenders.values())
        cells = [cell for contender in self.contenders.values() for cell in contender.cells.values()]
        if all(cell.examples for cell in cells):
            return "examples and seeds" if seeds > 1 else "examples"
        if seeds > 1:
            return "seeds"
        return "std" if any(cell.deviation is not None for cell in cells) else "values"

    @property
    def lacks_uncertainty(self) -> bool:
        """Return whether the table has one number a rank. Differences are then read from the values, and nothing is shown."""
        return self.basis in ("std", "values")

    @property
    def has_examples(self) -> bool:
        return self.basis in ("examples and seeds", "examples")

    def _estimate_seed_variance(self, rank: int, seeds: int) -> tuple[float, float]:
        """Estimate the variance of the rank's mean over this many seeds, with its degrees of freedom (0: not measured).

        It is pooled over the ranks that are at least as good, and also that of the rank's difference from the base model, which has no seed.
        """
        if self.basis not in ("examples and seeds", "seeds"):
            return 0.0, 0.0
        better = self._list_better_ranks(rank, lambda contender: len(contender.cells) > 1)
        variance, degrees = measure_seed_variance(better)
        return variance / seeds, degrees

    @cached_property
    def _ordered(self) -> list[Contender]:
        """Return the contenders, the best first."""
        return sorted(self.contenders.values(), key=lambda contender: (contender.loss, contender.rank))

    def _list_better_ranks(self, rank: int, has_noise: Callable[[Contender], bool]) -> list[Contender]:
        """List the contenders that are at least as good as this rank, the best first.

        If none of them has seed noise, the list continues up to the first one that has.
        """
        position = self._ordered.index(self.contenders[rank]) + 1
        up_to_first = next(
            (number for number, contender in enumerate(self._ordered, 1) if has_noise(contender)), position
        )
        return self._ordered[: max(position, up_to_first)]

    @cached_property
    def _pairs(self) -> dict[int, PairNoise]:
        """Return the noise of each rank's difference from the best."""
        best = self._ordered[0]
        return {contender.rank: _measure_pair_noise(pair_cells(contender, best)) for contender in self._ordered[1:]}

    @cached_property
    def has_seed_noise(self) -> bool:
        """Return whether any two ranks were compared on two seeds."""
        return any(pair.degrees > 0 for pair in self._pairs.values())

    def _build_noise_prior(
        self,
        rank: int,
        degrees: float,
        rank_degrees: float,
        *,
        examples: float | None = None,
    ) -> Prior:
        pairs = self._pairs
        measured = self._list_better_ranks(rank, lambda rival: rival.rank in pairs and pairs[rival.rank].degrees > 0)
        other_pairs = [pairs[rival.rank] for rival in measured if rival.rank in pairs and rival.rank != rank]
        count = examples or next(iter(self._ordered[0].cells.values())).num_groups
        start = Prior(NOISE.compute_seed_ratio(count), degrees) if self.has_examples else Prior(0.0, 0.0)
        return pool_prior(other_pairs, start, rank_degrees)

    @cached_property
    def selection_bias(self) -> float:
        """Estimate how much too good the reference looks as the best of all ranks (Smith and Winkler 2006, "The Optimizer's Curse").

        The test of "enough" is conservative by this amount. It is subtracted from lower bounds. Measured means have a
        larger spread than the true ones, so the bias at them is too small: ranks within `MAX_EQUAL_ERRORS` standard errors of the best are
        taken to be as good as it (the recentering of Hansen 2005, "A Test for Superior Predictive Ability", JBES 23), and the others are
        excluded. The reference's own noise is at most that of its quietest difference, so a noisy rank counts as one no noisier than the
        better ranks. benchmarks/decide/printed.py measures what this leaves of the error.
        """
        error, rivals, degrees = math.inf, [0.0], [MAX_DEGREES]
        for contender in self._ordered:
            if not compute_differences(pair_cells(contender, self.reference)).any():
                continue  # the reference itself, or a rank with the same scores
            difference = self.estimate_difference(contender)
            error = min(error, difference.standard_error)
            if contender.loss - self.reference.loss <= MAX_EQUAL_ERRORS * error:
                rivals.append(error**2)
                degrees.append(difference.degrees)
        # Two differences share the noise of the best rank: half of the smaller variance.
        covariance: Floats = np.minimum.outer(rivals, rivals) / 2
        np.fill_diagonal(covariance, rivals)
        noise = sample_multivariate_noise(covariance, float(np.median(degrees[1:] or degrees)), BOOTSTRAP_DRAWS)
        return max(0.0, -float(noise.min(axis=0).mean()))

    def is_at_edge(self, rank: int) -> bool:
        """Return whether the rank's best learning rate is the lowest or the highest of several that were tried."""
        return bool(self.table.list_edge_rates(self.contenders[rank].learning_rate, rank))

    def has_lower_rate(self, rank: int) -> bool:
        """Return whether a lower learning rate than the rank's best was tried too."""
        return self.table.list_tried_rates(rank)[0] < self.contenders[rank].learning_rate

    def list_lengths(self) -> set[int]:
        """Return the different numbers of steps of the compared trainings, if the table states them."""
        return {cell.steps for contender in self.contenders.values() for cell in contender.cells.values() if cell.steps}

    def estimate_value(self, contender: Contender) -> Estimate:
        """Estimate the contender's own mean."""
        cells = list(contender.cells.values())
        sums, span = np.stack([cell.sums for cell in cells]), max(cell.score_range for cell in cells)
        mean = replace(estimate_mean(sums, cells[0].weights, span, cells[0].groups), mean=contender.loss)
        if contender.rank == 0:
            return mean
        stated_variance = self._get_stated_variance(contender)
        if stated_variance is not None:
            return mean.replace_seed_variance(stated_variance, 0.0)
        variance, degrees = self._estimate_seed_variance(contender.rank, len(cells))
        return mean.replace_seed_variance(max(variance, mean.interaction_variance), degrees)

    def estimate_difference(self, contender: Contender, reference: Contender | None = None) -> Estimate:
        """Estimate how much worse the contender is than the reference, paired over examples and over shared seeds."""
        opponent = reference or self.reference
        pairs = pair_cells(contender, opponent)
        paired = replace(estimate_pairs(pairs), mean=contender.loss - opponent.loss)
        stated = [self._get_stated_variance(contender), self._get_stated_variance(opponent)]
        stated_variances = [variance for variance in stated if variance is not None]
        if len(stated_variances) == 2:
            return paired.replace_seed_variance(sum(stated_variances), 0.0)
        if contender.rank == 0 or opponent.rank == 0:
            variance, degrees = self._estimate_seed_variance(max(contender.rank, opponent.rank), len(pairs))
        else:
            pair = _measure_pair_noise(pairs)
            variance, degrees = pair.variance, pair.degrees
            if self.has_seed_noise:
                similarity = WITHIN_DEGREES if self.has_examples else BARE_WITHIN_DEGREES
                prior = self._build_noise_prior(contender.rank, BOUND_DEGREES, similarity)
                variance, degrees = prior.moderate(pair)
            variance /= len(pairs)
        return paired.replace_seed_variance(max(variance, paired.interaction_variance), degrees)

    def compute_probability(self, rank: int, margin: float) -> float | None:
        """Compute the probability that the rank is within the margin of every other rank at once, over seeds and examples.

        Returns None if the values have no uncertainty (`lacks_uncertainty`).
        """
        if self.lacks_uncertainty:
            return None
        ranks = [contender.rank for contender in self._all_contenders]
        return float(np.mean(self._worse_than_best[ranks.index(rank)] <= margin))

    def compute_margins(self, probability: float, seeds: int = 0, examples: int = 0) -> dict[int, float]:
        """Compute the margin from which each rank has the probability. The values must have an uncertainty.

        Args:
            seeds: a planned number of seeds; 0: the present one.
            examples: a planned number of examples; 0: the present one.
        """
        worse = self._worse_than_best
        if seeds or examples:
            worse = self._draw_losses_to_best(math.sqrt(self._compute_planned_variance(seeds, examples)))
        margins = np.quantile(worse, probability, axis=1, method="inverted_cdf").tolist()
        contenders = zip(self._all_contenders, margins, strict=True)
        return {contender.rank: margin for contender, margin in contenders if contender.rank > 0}

    def _compute_planned_variance(self, seeds: int, examples: int) -> float:
        """Compute the variance at a planned size divided by the present one; arguments as in `compute_margins`."""
        seeds_now, examples_now = self.size
        if examples_now == 0:
            return seeds_now / (seeds or seeds_now)
        now = self.noise.compute_ratio(seeds_now, examples_now / self._design_effect)
        return self.noise.compute_ratio(seeds or seeds_now, (examples or examples_now) / self._design_effect) / now

    @cached_property
    def _worse_than_best(self) -> Floats:
        return self._draw_losses_to_best(1.0)

    def _draw_losses_to_best(self, noise: float) -> Floats:
        """Return [ranks and base, draws] how much worse each of them truly is than the best rank, with the noise scaled by `noise`."""
        means = np.array([contender.loss for contender in self._all_contenders])
        true_losses = means[:, None] + noise * self._joint_noise
        is_rival = [contender.rank > 0 for contender in self._all_contenders]
        worse: Floats = true_losses - true_losses[is_rival].min(axis=0)
        return worse

    @cached_property
    def _design_effect(self) -> float:
        """Return how many examples of a group count as one independent example."""
        return max(
            _measure_pair_noise(pair_cells(rival, self.reference)).design_effect for rival in self.contenders.values()
        )

    @property
    def size(self) -> tuple[int, int]:
        """Return the fewest seeds of a rank, and the number of examples."""
        cells = [contender.cells for contender in self.contenders.values()]
        return min(map(len, cells)), next(iter(cells[0].values())).examples

    @cached_property
    def _all_contenders(self) -> list[Contender]:
        """Return the ranks and the base model, the best first."""
        everyone = [*self.contenders.values(), *([self.base] if self.base else [])]
        return sorted(everyone, key=lambda contender: (contender.loss, contender.rank))

    @cached_property
    def _joint_noise(self) -> Floats:
        """Return [ranks and base, draws] of the noise of the measured means about the true ones, with the degrees of the best two ranks."""
        everyone, best_ranks = self._all_contenders, {contender.rank for contender in self._ordered[:2]}
        variances, degrees = np.zeros((len(everyone), len(everyone))), MAX_DEGREES
        for (row, first), (column, second) in combinations(enumerate(everyone), 2):
            variance, pair_degrees = self._measure_true_difference(first, second)
            variances[row, column] = variances[column, row] = variance
            degrees = pair_degrees if {first.rank, second.rank} == best_ranks else degrees
        return sample_joint_noise(variances, degrees)

    def _measure_true_difference(self, better: Contender, worse: Contender) -> tuple[float, float]:
        """Return the variance of the measured difference about the true one, and its degrees of freedom."""
        rank = worse.rank or better.rank
        if not self.has_examples:
            first, second = (worse, better) if worse.rank else (better, worse)
            difference = self.estimate_difference(first, second)
            return difference.variance, difference.degrees
        pairs = pair_cells(better, worse)
        pair = _measure_pair_noise(pairs)
        examples = pairs[0][0].examples / pair.design_effect
        variance, degrees = self._build_noise_prior(rank, NOISE_DEGREES, math.inf, examples=examples).moderate(pair)
        variance /= len(pairs)
        variance += (self.noise.examples / examples + self.noise.learning_rates) * pair.example_variance
        if pair.example_variance == 0:  # Bounded scores that are all equal are no proof of equal adapters.
            variance = max(variance, estimate_pairs(pairs).examples_variance)
        return variance, max(1.0, min(degrees, examples - 1))

    def _get_stated_variance(self, contender: Contender) -> float | None:
        """Return the variance of the contender's mean that the table states, or None if the evidence does not rest on such deviations."""
        if self.basis != "std":
            return None
        cell = next(iter(contender.cells.values()))
        return None if cell.deviation is None else cell.deviation**2 / cell.deviation_seeds


def measure_seed_variance(contenders: list[Contender]) -> tuple[float, float]:
    """Measure the variance of one training over seeds, pooled over the ranks with two seeds or more, and its degrees of freedom.

    If two or more of them share two or more seeds, the variance that they have in common is separated from that of each rank, since it
    has only the degrees of freedom of the seeds (Satterthwaite).
    """
    several = [contender for contender in contenders if len(contender.cells) > 1]
    shared = sorted(set.intersection(*(set(contender.cells) for contender in several)))
    if len(several) < 2 or len(shared) < 2:
        losses = [[cell.loss for cell in contender.cells.values()] for contender in several]
        degrees = sum(len(values) - 1.0 for values in losses)
        return sum(float(np.var(values, ddof=1)) * (len(values) - 1) for values in losses) / degrees, degrees
    means = np.array([[contender.cells[seed].loss for seed in shared] for contender in several])
    level = means.mean(axis=0)
    residuals = means - means.mean(axis=1, keepdims=True) - level + level.mean()
    seed_degrees = len(shared) - 1.0
    rank_degrees = seed_degrees * (len(several) - 1.0)
    individual = float((residuals**2).sum()) / rank_degrees
    common = max(0.0, float(level.var(ddof=1)) - individual / len(several))
    squares = common**2 / seed_degrees + individual**2 / rank_degrees
    return common + individual, (common + individual) ** 2 / squares if squares > 0 else 0.0


def _measure_pair_noise(pairs: list[Pair]) -> PairNoise:
    return measure_pair_noise(compute_differences(pairs), pairs[0][0].weights, pairs[0][0].groups)


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
    likeness = float((sum_by_group(influence, groups) ** 2).sum()) / squares if squares > 0 else 1.0
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
