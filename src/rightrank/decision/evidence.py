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
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np

from rightrank.decision.comparison import (
    CONFIDENCE,
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
    JointMeans,
    NoiseComponents,
    PairNoise,
    Prior,
    compute_mean_noise,
    get_noise,
    measure_pair_noise,
    pool_prior,
    sample_joint_means,
    sample_multivariate_noise,
    split_seed_variance,
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


@dataclass(frozen=True, slots=True)
class _SeedNoise:
    """Variances of one training's mean over seeds."""

    common: float  # shared by all ranks of a seed
    common_degrees: float
    individual: float  # of each rank; a paired difference has twice this
    individual_degrees: float  # 0: stated or published, not measured

    def compute_mean_variance(self, seeds: int) -> tuple[float, float]:
        """Compute the variance of a mean over this many seeds, and Satterthwaite's degrees of freedom (0: not measured)."""
        components = [(self.common, self.common_degrees), (self.individual, self.individual_degrees)]
        squares = sum(variance**2 / degrees for variance, degrees in components if degrees > 0)
        total = sum(variance for variance, _ in components)
        return total / seeds, total**2 / squares if squares > 0 else 0.0


class Evidence:
    """The statistical evidence in a table, in the oriented unit: lower is better, nats for a perplexity."""

    def __init__(self, table: ScoreTable, noise: NoiseComponents | None = None) -> None:
        """Collect the evidence of a table. `noise` is that of earlier grids; None for that of the table's metric."""
        outliers = find_outliers(table)
        self.table = table = table.exclude_cells(outliers)
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
        return compute_margin(margin, self.table.kind, self.unit.reference, self.table.list_values(), gain)

    def convert_margin(self, margin: Margin | None, base_loss: float | None = None) -> float:
        """Return the margin in the oriented unit."""
        return self.unit.convert_margin(self.resolve_margin(margin, base_loss))

    @property
    def margin_without_base(self) -> float:
        """Return the default margin of a table without a base, in the oriented unit."""
        margin = compute_margin(None, self.table.kind, self.unit.reference, self.table.list_values(), None)
        return self.unit.convert_margin(margin)

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

    def estimate_noise(self, rank: int) -> _SeedNoise:
        """Estimate the seed noise of the rank's mean, pooled over the ranks that are at least as good.

        It also applies to the rank's difference from the base model, which has no seed.
        """
        if self.basis in ("examples and seeds", "seeds"):
            return measure_noise(self._list_better_ranks(rank, lambda contender: len(contender.cells) > 1))
        return _SeedNoise(0.0, 0.0, 0.0, 0.0)

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

    def build_prior(self, rank: int) -> Prior | None:
        """Return the expected seed noise of the rank's difference for a bound, or None if no two ranks share two seeds."""
        prior_degrees = WITHIN_DEGREES if self.has_examples else BARE_WITHIN_DEGREES
        return self._build_noise_prior(rank, BOUND_DEGREES, prior_degrees) if self.has_seed_noise else None

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
        for contender in sorted(self.contenders.values(), key=lambda rival: (rival.loss, rival.rank)):
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
        variance, degrees = self.estimate_noise(contender.rank).compute_mean_variance(len(contender.cells))
        return mean.replace_seed_variance(max(variance, mean.interaction_variance), degrees)

    def estimate_difference(self, contender: Contender, reference: Contender | None = None) -> Estimate:
        """Estimate how much worse the contender is than the reference, paired over examples and over shared seeds."""
        opponent = reference or self.reference
        pairs = pair_cells(contender, opponent)
        paired = replace(estimate_pairs(pairs), mean=contender.loss - opponent.loss)
        stated_variances = [self._get_stated_variance(contender), self._get_stated_variance(opponent)]
        if all(variance is not None for variance in stated_variances):
            return paired.replace_seed_variance(
                sum(variance for variance in stated_variances if variance is not None), 0.0
            )
        if contender.rank == 0 or opponent.rank == 0:
            variance, degrees = self.estimate_noise(max(contender.rank, opponent.rank)).compute_mean_variance(
                len(pairs)
            )
        elif self.lacks_uncertainty:
            variance, degrees = 0.0, 0.0
        else:
            variance, degrees = _estimate_seed_variance(pairs, self.build_prior(contender.rank))
        return paired.replace_seed_variance(max(variance, paired.interaction_variance), degrees)

    def compute_probability(self, rank: int, margin: float) -> float | None:
        """Compute the probability that the rank is within the margin of every other rank at once, over seeds and examples.

        Returns None if the values have no uncertainty (`lacks_uncertainty`).
        """
        if self.lacks_uncertainty:
            return None
        return float(np.mean(self._worse_than_best[self.joint.ranks.index(rank)] <= margin))

    def compute_margins(self, probability: float, seeds: int = 0, examples: int = 0) -> dict[int, float]:
        """Compute the margin from which each rank has the probability. The values must have an uncertainty.

        Args:
            seeds: a planned number of seeds; 0: the present one.
            examples: a planned number of examples; 0: the present one.
        """
        worse = self._worse_than_best
        if seeds or examples:
            worse = self.joint.compute_losses_to_best(math.sqrt(self._compute_planned_variance(seeds, examples)))
        margins = np.quantile(worse, probability, axis=1, method="inverted_cdf")
        return {rank: margin for rank, margin in zip(self.joint.ranks, margins.tolist(), strict=True) if rank > 0}

    def _compute_planned_variance(self, seeds: int, examples: int) -> float:
        """Compute the variance at a planned size divided by the present one; arguments as in `compute_margins`."""
        seeds_now, examples_now = self.size
        if examples_now == 0:
            return seeds_now / (seeds or seeds_now)
        now = self.noise.compute_ratio(seeds_now, examples_now / self._design_effect)
        return self.noise.compute_ratio(seeds or seeds_now, (examples or examples_now) / self._design_effect) / now

    @cached_property
    def _worse_than_best(self) -> Floats:
        return self.joint.compute_losses_to_best()

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

    def find_indistinguishable_ranks(self, confidence: float) -> list[int]:
        """Return the ranks that are not shown to be worse than the best, in ascending order.

        The confidence is at least `CONFIDENCE`.
        """
        return self.joint.find_indistinguishable_ranks(max(CONFIDENCE, confidence))

    @cached_property
    def joint(self) -> JointMeans:
        """Return the joint distribution of the true means of ranks and base model."""
        ranks, losses = zip(*((contender.rank, contender.loss) for contender in self._all_contenders), strict=True)
        return sample_joint_means(ranks, losses, *self._pairwise_posteriors)

    @property
    def _all_contenders(self) -> list[Contender]:
        """Return the ranks and the base model, the best first."""
        everyone = [*self.contenders.values(), *([self.base] if self.base else [])]
        return sorted(everyone, key=lambda contender: (contender.loss, contender.rank))

    @cached_property
    def _pairwise_posteriors(self) -> tuple[Floats, float]:
        """Return [ranks, ranks] variances of the measured differences about the true ones, and the degrees of freedom of the best two ranks."""
        positions = {contender.rank: number for number, contender in enumerate(self._ordered)}
        variances, degrees = np.zeros((len(self._all_contenders), len(self._all_contenders))), 0.0
        best = {contender.rank for contender in self._ordered[:2]}
        for (row, first), (column, second) in combinations(enumerate(self._all_contenders), 2):
            worse = max((first, second), key=lambda contender: positions.get(contender.rank, -1))
            if self.has_examples:
                pairs = pair_cells(first, second)
                noise = _measure_pair_noise(pairs)
                examples = pairs[0][0].examples / noise.design_effect
                prior = self._build_noise_prior(worse.rank, NOISE_DEGREES, math.inf, examples=examples)
                variance, of_pair = compute_mean_noise(noise, prior, len(pairs), examples, self.noise)
                of_pair = max(1.0, min(of_pair, examples - 1))
                if noise.example_variance == 0:  # Bounded scores that are all equal are no proof of equal adapters.
                    variance = max(variance, estimate_pairs(pairs).examples_variance)
            else:
                difference = self.estimate_difference(worse, first if worse is second else second)
                variance, of_pair = difference.variance, difference.degrees
            variances[row, column] = variances[column, row] = variance
            degrees = of_pair if {first.rank, second.rank} == best else degrees
        return variances, degrees

    def _get_stated_variance(self, contender: Contender) -> float | None:
        """Return the variance of the contender's mean that the table states, or None if the evidence does not rest on such deviations."""
        if self.basis != "std":
            return None
        cell = next(iter(contender.cells.values()))
        return None if cell.deviation is None else cell.deviation**2 / cell.deviation_seeds


def measure_noise(contenders: list[Contender]) -> _SeedNoise:
    """Measure the seed noise of the ranks with two seeds or more, pooled over these ranks.

    If two or more of them share two or more seeds, the variance that they have in common is separated from the individual one.
    """
    several = [contender for contender in contenders if len(contender.cells) > 1]
    shared = sorted(set.intersection(*(set(contender.cells) for contender in several)))
    if len(several) > 1 and len(shared) > 1:
        means = np.array([[contender.cells[seed].loss for seed in shared] for contender in several])
        common, individual = split_seed_variance(means)
        pure = max(0.0, common - individual / len(several))
        return _SeedNoise(pure, len(shared) - 1.0, individual, (len(several) - 1.0) * (len(shared) - 1.0))
    squares = sum(float(np.var([cell.loss for cell in c.cells.values()], ddof=1)) * (len(c.cells) - 1) for c in several)
    degrees = float(sum(len(contender.cells) - 1 for contender in several))
    return _SeedNoise(0.0, 0.0, squares / degrees, degrees)


def _measure_pair_noise(pairs: list[Pair]) -> PairNoise:
    return measure_pair_noise(compute_differences(pairs), pairs[0][0].weights, pairs[0][0].groups)


def _estimate_seed_variance(pairs: list[Pair], prior: Prior | None) -> tuple[float, float]:
    """Return the seed variance of a mean of paired differences, and its degrees of freedom; 0 if nothing was measured."""
    noise = _measure_pair_noise(pairs)
    if prior is None:
        return noise.variance / len(pairs), noise.degrees
    variance, degrees = prior.moderate(noise)
    return variance / len(pairs), degrees
