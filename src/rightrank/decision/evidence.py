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
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from itertools import combinations

import numpy as np

from rightrank.decision.comparison import (
    MAX_DEGREES,
    Estimate,
    estimate_mean,
    is_within,
    walk_down,
)
from rightrank.decision.seeds import (
    BARE_WITHIN_DEGREES,
    BOOTSTRAP_DRAWS,
    BOUND_DEGREES,
    NOISE,
    NOISE_DEGREES,
    WITHIN_DEGREES,
    NoiseComponents,
    PairNoise,
    Prior,
    get_noise,
    measure_pair_noise,
    pool_prior,
    sample_joint_noise,
    sample_multivariate_noise,
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
from rightrank.schema.decision import Basis
from rightrank.schema.metrics import Margin, compute_margin
from rightrank.schema.trials import Floats

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
        return self._compute_margin(margin, gain)

    def _compute_margin(self, margin: Margin | None, gain: float | None) -> float:
        values = [cell.value for cell in self.table.cells.values()]
        return compute_margin(margin, self.table.kind, self.unit.reference, values, gain)

    def convert_margin(self, margin: Margin | None, base_loss: float | None = None) -> float:
        """Return the margin in the oriented unit."""
        return self.unit.convert_margin(self.resolve_margin(margin, base_loss))

    @property
    def margin_without_base(self) -> float:
        """Return the default margin of a table without a base, in the oriented unit."""
        return self.unit.convert_margin(self._compute_margin(None, None))

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
