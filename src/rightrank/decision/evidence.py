"""The evidence in a table: the mean of each rank, its paired difference from the reference, and whether it is enough.

The data decide what an interval rests on (`Evidence.basis`):

    items and seeds   examples and seeds vary: the closed form of two crossed factors
    items             one seed: the examples are measured, and the noise over seeds is unknown
    seeds             one number a training, two or more trainings at a rank
    std               one number a rank with a stated standard deviation
    values            one number a rank and no deviation: scatter about the curve

Ranks and learning rates are compared on the seeds that they share. A single seed gives an indication: its intervals leave
out the noise over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np

from rightrank.decision.comparison import (
    CONFIDENCE,
    MAX_DEGREES,
    Bounds,
    Estimate,
    by_group,
    descending,
    estimate,
    is_within,
    t_quantile,
    walk_down,
)
from rightrank.decision.posterior import JointMeans, sample_joint_means
from rightrank.decision.seeds import (
    BARE_WITHIN_DEGREES,
    BOUND_DEGREES,
    MIN_EXAMPLES,
    NOISE,
    NOISE_DEGREES,
    WITHIN_DEGREES,
    PairNoise,
    Prior,
    noise_of_mean,
    pair_noise,
    prior_of,
    seed_parts,
    winners_gap,
)
from rightrank.decision.table import (
    Cell,
    Contender,
    Pair,
    ScoreTable,
    adjusted_means,
    contender_of,
    differences,
    estimate_of_pairs,
    losses_by_seed,
    of_shared_seeds,
    on_common_seeds,
    paired_cells,
)
from rightrank.schema.decision import Basis, StaircaseStep
from rightrank.schema.metrics import MetricKind
from rightrank.schema.trials import Floats

MIN_CURVE_RANKS = 4  # one more than the power law has parameters
# The power law's exponent: 61 candidates, with a prior twice as wide as 26 published curves are (median .57, quartiles .38 and .64).
EXPONENTS, TYPICAL_EXPONENT, EXPONENT_WIDTH = np.geomspace(0.1, 2.0, 61), 0.57, 0.8
ALIKE = 2.0  # standard errors of its difference, up to which a rank is taken to be as good as the best
ITSELF = Estimate(0.0, 0.0, 0.0, 0.0, 0, 1, 0.0, 0.0)  # of the reference from itself
MAX_EXPONENT = 100.0  # keeps the bound of a perplexity finite


@dataclass(frozen=True, slots=True)
class _SeedNoise:
    """Variances over seeds of the mean of one training."""

    common: float  # shared by all ranks of a seed
    common_degrees: float
    individual: float  # of each rank; a paired difference has twice this
    individual_degrees: float  # 0: stated or published, not measured

    def of_mean(self, seeds: int) -> tuple[float, float]:
        """The variance of a mean over so many seeds, and its degrees of freedom by Satterthwaite (0: not measured)."""
        parts = [(self.common, self.common_degrees), (self.individual, self.individual_degrees)]
        squares = sum(variance**2 / degrees for variance, degrees in parts if degrees > 0)
        whole = sum(variance for variance, _ in parts)
        return whole / seeds, whole**2 / squares if squares > 0 else 0.0


class Evidence:
    """What a table shows. Everything is in the oriented unit: lower is better, nats for a perplexity."""

    def __init__(self, table: ScoreTable) -> None:
        self.table = table
        self._bare = on_common_seeds([contender_of(table, rank) for rank in table.ranks()])
        self.contenders = {rank: replace(bare, gap=self._gap(bare)) for rank, bare in self._bare.items()}
        self.base = contender_of(table, 0) if table.by_learning_rate(0) else None
        self.reference = min(self.contenders.values(), key=lambda contender: (contender.fair_loss, contender.rank))

    @cached_property
    def basis(self) -> Basis:
        seeds = max(len(contender.cells) for contender in self._bare.values())
        cells = [cell for contender in self._bare.values() for cell in contender.cells.values()]
        if all(cell.examples for cell in cells):
            return "items and seeds" if seeds > 1 else "items"
        if seeds > 1:
            return "seeds"
        return "std" if any(cell.deviation is not None for cell in cells) else "values"

    @property
    def is_point_reading(self) -> bool:
        """Whether the table has one number a rank: differences are then read from the values, and nothing is shown."""
        return self.basis in ("std", "values")

    @property
    def has_examples(self) -> bool:
        return self.basis in ("items and seeds", "items")

    @cached_property
    def scatter(self) -> float:
        """The variance of a training about the curve, where bare values are all there is; else 0."""
        return _curve_scatter(list(self._bare.values())) ** 2 if self.basis == "values" else 0.0

    def noise(self, rank: int) -> _SeedNoise:
        """Of the rank's own mean, and of its difference from the base, which has no seed: from the ranks at least as good as it."""
        if self.basis in ("items and seeds", "seeds"):
            return measured_noise(self._at_least_as_good(rank, lambda contender: len(contender.cells) > 1))
        return _SeedNoise(0.0, 0.0, self.scatter, 0.0)

    @cached_property
    def _ordered(self) -> list[Contender]:
        """The best first."""
        return sorted(self._bare.values(), key=lambda contender: (contender.fair_loss, contender.rank))

    def _at_least_as_good(self, rank: int, measures: Callable[[Contender], bool]) -> list[Contender]:
        """The ranks up to this one, the best first; where none of them `measures` the noise over seeds, up to the first that does."""
        place = self._ordered.index(self._bare[rank]) + 1
        up_to_first = next((number for number, contender in enumerate(self._ordered, 1) if measures(contender)), place)
        return self._ordered[: max(place, up_to_first)]

    @cached_property
    def _pairs(self) -> dict[int, PairNoise]:
        """The noise of each rank's difference from the best."""
        best = self._ordered[0]
        return {contender.rank: _noise_of(paired_cells(contender, best)) for contender in self._ordered[1:]}

    @cached_property
    def measures_seeds(self) -> bool:
        """Whether any two ranks were compared on two seeds."""
        return any(pair.degrees > 0 for pair in self._pairs.values())

    def prior(self, rank: int, *, own: bool = False) -> Prior | None:
        """The seed noise that is expected of the rank's differences, for a bound; None where no two seeds were compared.

        That of its difference from the best is left out, unless `own`: the expectation is then of another difference.
        """
        within = WITHIN_DEGREES if self.has_examples else BARE_WITHIN_DEGREES
        return self._expected(rank, BOUND_DEGREES, within, own=own) if self.measures_seeds else None

    def _expected(
        self, rank: int, degrees: float, within: float, *, own: bool = False, examples: float | None = None
    ) -> Prior:
        pairs = self._pairs
        known = self._at_least_as_good(rank, lambda rival: rival.rank in pairs and pairs[rival.rank].degrees > 0)
        others = [pairs[rival.rank] for rival in known if rival.rank in pairs and (own or rival.rank != rank)]
        count = examples or next(iter(self._ordered[0].cells.values())).units
        start = Prior(NOISE.over_seeds(count), degrees) if self.has_examples else Prior(0.0, 0.0)
        return prior_of(others, start, within)

    @cached_property
    def reference_gap(self) -> float:
        """The winner's curse of the reference as the best of all ranks: differences from it look larger than they are.

        The test of "enough" is conservative by this amount. It is taken out before a rank is called not enough. Shown means are more spread
        than the true ones, and so the gap at them is too small: ranks within `ALIKE` standard errors of the best are taken to be as good as
        it (the recentring of Hansen 2005, "A Test for Superior Predictive Ability", JBES 23), and the others out of the race. The reference's
        own noise is at most that of its quietest difference, so a noisy rank counts as one no noisier than the better ranks.
        benchmarks/decide/printed.py measures what this leaves of the error.
        """
        error, rivals, degrees = math.inf, [0.0], [MAX_DEGREES]
        for contender in sorted(self.contenders.values(), key=lambda other: (other.fair_loss, other.rank)):
            if not differences(paired_cells(contender, self.reference)).any():
                continue  # itself, or one with the same scores
            difference = self.difference(contender)
            error = min(error, difference.standard_error)
            if contender.fair_loss - self.reference.fair_loss <= ALIKE * error:
                rivals.append(error**2)
                degrees.append(difference.degrees)
        return winners_gap(np.zeros(len(rivals)), about_the_best(rivals), float(np.median(degrees[1:] or degrees)))

    def is_at_edge(self, rank: int) -> bool:
        """Whether the rank's best learning rate is the lowest or the highest of several that were tried."""
        return bool(self.table.rates_ending_at(self.contenders[rank].learning_rate, rank))

    def value(self, contender: Contender) -> Estimate:
        """The contender's own mean."""
        cells = list(contender.cells.values())
        sums, span = np.stack([cell.sums for cell in cells]), max(cell.span for cell in cells)
        mean = estimate(sums, cells[0].weights, span, cells[0].groups)
        if contender.rank == 0:
            return mean
        stated = self._stated(contender)
        if stated is not None:
            return mean.with_seeds(stated, 0.0)
        variance, degrees = self.noise(contender.rank).of_mean(len(contender.cells))
        return mean.with_seeds(max(variance, mean.interaction_variance), degrees)

    def difference(self, contender: Contender, reference: Contender | None = None) -> Estimate:
        """How much worse the contender is than the reference, paired over examples, and over seeds that both have."""
        against = reference or self.reference
        pairs = paired_cells(contender, against)
        paired = estimate_of_pairs(pairs, shift=contender.gap - against.gap)
        stated = [self._stated(contender), self._stated(against)]
        if all(variance is not None for variance in stated):
            return paired.with_seeds(sum(variance for variance in stated if variance is not None), 0.0)
        if contender.rank == 0 or against.rank == 0:
            variance, degrees = self.noise(max(contender.rank, against.rank)).of_mean(len(pairs))
        elif self.is_point_reading:
            variance, degrees = 2 * self.scatter, 0.0
        else:
            variance, degrees = _seeds_part(pairs, self.prior(contender.rank))
        return paired.with_seeds(max(variance, paired.interaction_variance), degrees)

    def expected(self, contender: Contender, seeds: int) -> Estimate:
        """The difference that `seeds` seeds are expected to show, at the seed noise of earlier grids: for plans alone."""
        pairs = paired_cells(contender, self.reference)
        paired = estimate_of_pairs(pairs, shift=contender.gap - self.reference.gap)
        variance = NOISE.over_seeds(paired.examples) * _noise_of(pairs).spread / seeds
        return replace(paired, seeds=seeds).with_seeds(variance, BOUND_DEGREES + seeds - 1)

    @property
    def has_several_seeds(self) -> bool:
        return any(len(contender.cells) > 1 for contender in self.contenders.values())

    @cached_property
    def no_probability(self) -> str:
        """Why the ranks have no probability, as a clause; empty where each has one."""
        contenders = list(self.contenders.values())
        cells = [cell for contender in contenders for cell in contender.cells.values()]
        if not self.has_examples:
            return "one number a training shows no noise"
        if self.table.kind == "other":
            return f"how {self.table.metric} varies between seeds is not known"
        if not set.intersection(*(set(contender.cells) for contender in contenders if contender.rank > 0)):
            return "the ranks have no seed in common"
        if len({cell.steps for cell in cells}) > 1:
            return "the trainings have unequal numbers of steps"
        if cells[0].units < MIN_EXAMPLES:
            noun = "examples" if cells[0].groups is None else "groups of examples"
            return f"{cells[0].units} {noun} are too few (at least {MIN_EXAMPLES})"
        variances, _ = self._apart
        return "two ranks have the same scores" if (variances + np.eye(len(variances)) <= 0).any() else ""

    def probability(self, rank: int, margin: float) -> float | None:
        """That the rank is within the margin of every other rank at once, over seeds and examples; None where there is none (`no_probability`)."""
        if self.no_probability:
            return None
        return float(np.mean(self._worse_than_best[self.joint.ranks.index(rank)] <= margin))

    def margins_at(self, probability: float, seeds: int = 0, examples: int = 0) -> dict[int, float]:
        """The margin from which each rank has the probability, which there must be; with so many seeds and examples, where they are given."""
        worse = self._worse_than_best
        if seeds or examples:
            seeds_now, examples_now = self.size
            now = NOISE.ratio(seeds_now, examples_now / self._likeness)
            planned = NOISE.ratio(seeds or seeds_now, (examples or examples_now) / self._likeness)
            worse = self.joint.worse_than_best(math.sqrt(planned / now))
        margins = np.quantile(worse, probability, axis=1, method="inverted_cdf")
        return {rank: margin for rank, margin in zip(self.joint.ranks, margins.tolist(), strict=True) if rank > 0}

    @cached_property
    def _worse_than_best(self) -> Floats:
        return self.joint.worse_than_best()

    @cached_property
    def _likeness(self) -> float:
        """How many examples of a group count as one."""
        return max(_noise_of(paired_cells(rival, self.reference)).likeness for rival in self.contenders.values())

    @property
    def size(self) -> tuple[int, int]:
        """The fewest seeds of a rank, and the examples of each."""
        cells = [contender.cells for contender in self.contenders.values()]
        return min(map(len, cells)), next(iter(cells[0].values())).examples

    def alike(self, confidence: float) -> list[int]:
        """The ranks that are not shown to be worse than the best with this confidence, or `CONFIDENCE` if that is higher, ascending."""
        return self.joint.alike(max(CONFIDENCE, confidence))

    def half_width(self, confidence: float) -> float:
        """How far the differences of `alike` ranks from the best are known, either way; 0 where there is one."""
        errors = [self.joint.error(rank, self.reference.rank) for rank in self.alike(confidence)]
        return max(errors) * t_quantile(self.joint.degrees, (1 + confidence) / 2)

    @cached_property
    def joint(self) -> JointMeans:
        """The joint distribution of the true means of ranks and base, which there must be (`no_probability`)."""
        ranks, losses = zip(*((contender.rank, contender.fair_loss) for contender in self._everyone), strict=True)
        return sample_joint_means(ranks, losses, *self._apart)

    @property
    def _everyone(self) -> list[Contender]:
        """Ranks and base, the best first."""
        everyone = [*self.contenders.values(), *([self.base] if self.base else [])]
        return sorted(everyone, key=lambda contender: (contender.fair_loss, contender.rank))

    @cached_property
    def _apart(self) -> tuple[Floats, float]:
        """[ranks, ranks] variance of each measured difference about the true one, of `_everyone`; and the degrees of freedom, of the best two ranks."""
        place = {contender.rank: number for number, contender in enumerate(self._ordered)}
        variances, degrees = np.zeros((len(self._everyone), len(self._everyone))), 0.0
        best = {contender.rank for contender in self._ordered[:2]}
        for (row, first), (column, other) in combinations(enumerate(self._everyone), 2):
            pairs = paired_cells(first, other)
            noise = _noise_of(pairs)
            worse = max((first.rank, other.rank), key=lambda rank: place.get(rank, -1))
            examples = pairs[0][0].examples / noise.likeness
            prior = self._expected(worse, NOISE_DEGREES, math.inf, examples=examples)
            variance, of_pair = noise_of_mean(noise, prior, len(pairs), examples)
            variances[row, column] = variances[column, row] = variance
            degrees = of_pair if {first.rank, other.rank} == best else degrees
        return variances, degrees

    def _stated(self, contender: Contender) -> float | None:
        """The variance of the contender's mean that the table states, if the evidence rests on stated deviations."""
        if self.basis != "std":
            return None
        cell = next(iter(contender.cells.values()))
        return None if cell.deviation is None else cell.deviation**2 / cell.deviation_seeds

    def _gap(self, contender: Contender) -> float:
        """The winner's curse of the best of the rank's learning rates."""
        rank, best = contender.rank, contender.learning_rate
        by_seed = self.table.by_learning_rate(rank)
        if len(by_seed) < 2:
            return 0.0
        columns = {lr: list(cells.values()) for lr, cells in by_seed.items()}
        means = np.array(adjusted_means([losses_by_seed(cells) for cells in by_seed.values()]))
        if self.is_point_reading:
            seeds = np.diag([self.scatter] * len(columns))
        else:
            prior = self.prior(rank, own=True)
            pairs = {lr: of_shared_seeds(by_seed[lr], contender.cells) for lr in columns if lr != best}
            seeds = about_the_best([_seeds_part(pairs[lr], prior)[0] if pairs.get(lr) else 0.0 for lr in columns])
        return winners_gap(means, seeds + _examples_part(list(columns.values())))


def measured_noise(contenders: list[Contender]) -> _SeedNoise:
    """Seed noise from the ranks with two seeds or more, pooled over ranks.

    Where two of these ranks or more share two seeds or more, the common part is separated from the individual one.
    """
    several = [contender for contender in contenders if len(contender.cells) > 1]
    shared = sorted(set.intersection(*(set(contender.cells) for contender in several)))
    if len(several) > 1 and len(shared) > 1:
        means = np.array([[contender.cells[seed].loss for seed in shared] for contender in several])
        common, individual = seed_parts(means)
        pure = max(0.0, common - individual / len(several))
        return _SeedNoise(pure, len(shared) - 1.0, individual, (len(several) - 1.0) * (len(shared) - 1.0))
    squares = sum(float(np.var([cell.loss for cell in c.cells.values()], ddof=1)) * (len(c.cells) - 1) for c in several)
    degrees = float(sum(len(contender.cells) - 1 for contender in several))
    return _SeedNoise(0.0, 0.0, squares / degrees, degrees)


def _curve_scatter(contenders: list[Contender]) -> float:
    """The standard deviation of bare values about the power law a + b·r^-c, b ≥ 0; 0 below `MIN_CURVE_RANKS` ranks."""
    if len(contenders) < MIN_CURVE_RANKS:
        return 0.0
    losses = np.array([contender.loss for contender in contenders])
    shapes = np.array([float(contender.rank) for contender in contenders]) ** -EXPONENTS[:, None]  # [exponents, ranks]
    centred = shapes - shapes.mean(axis=1, keepdims=True)
    slopes = np.maximum(centred @ losses / (centred**2).sum(axis=1), 0.0)
    squares = ((losses - losses.mean() - slopes[:, None] * centred) ** 2).sum(axis=1)
    deviation = max(float(np.ptp(losses)) * 1e-3, 1e-12)
    penalty = (np.log(EXPONENTS / TYPICAL_EXPONENT) / EXPONENT_WIDTH) ** 2
    best = int(np.argmin(squares / deviation**2 + penalty))
    return float(np.sqrt(squares[best] / (len(losses) - 3)))


def _noise_of(pairs: list[Pair]) -> PairNoise:
    return pair_noise(differences(pairs), pairs[0][0].weights, pairs[0][0].groups)


def _seeds_part(pairs: list[Pair], prior: Prior | None) -> tuple[float, float]:
    """The seed variance of the mean of paired differences, and its degrees of freedom; 0 where nothing was measured."""
    noise = _noise_of(pairs)
    if prior is None:
        return noise.variance / len(pairs), noise.degrees
    variance, degrees = prior.moderated(noise)
    return variance / len(pairs), degrees


def about_the_best(differences: list[float]) -> Floats:
    """[columns, columns] covariance of the columns' noise less that of the best column, from the differences' variances.

    Two differences share the noise of the best column: half of the smaller variance.
    """
    variances = np.array(differences)
    covariance: Floats = np.minimum.outer(variances, variances) / 2
    np.fill_diagonal(covariance, variances)
    return covariance


def _examples_part(columns: list[list[Cell]]) -> Floats:
    """[columns, columns] covariance of the columns' means over examples, without the shared part; 0 without examples."""
    if not all(cell.examples for column in columns for cell in column):
        return np.zeros((len(columns), len(columns)))
    groups = columns[0][0].groups
    weights = by_group(columns[0][0].weights, groups)
    sums = by_group(np.stack([np.mean([cell.sums for cell in column], axis=0) for column in columns]), groups)
    influence = (sums - np.outer(sums.sum(axis=1) / weights.sum(), weights)) / weights.mean()
    influence = influence - influence.mean(axis=0)
    examples = influence.shape[1]
    covariance: Floats = influence @ influence.T / (examples * (examples - 1))
    return covariance


@dataclass(frozen=True, slots=True)
class Unit:
    """Conversion from the oriented unit (lower is better, nats for a perplexity) to the metric's unit."""

    kind: MetricKind
    higher_is_better: bool
    reference: float  # the reference's value in the metric's unit

    def value(self, oriented: float) -> float:
        if self.kind == "perplexity":
            return math.exp(min(oriented, MAX_EXPONENT))
        return -oriented if self.higher_is_better else oriented

    def difference(self, oriented: float) -> float:
        """How much worse than the reference, in the metric's unit."""
        return self.reference * math.expm1(min(oriented, MAX_EXPONENT)) if self.kind == "perplexity" else oriented

    def oriented_margin(self, margin: float) -> float:
        return math.log1p(margin / self.reference) if self.kind == "perplexity" else margin


@dataclass(frozen=True, slots=True)
class Compared:
    """One rank against the reference, in the oriented unit."""

    contender: Contender
    mean: Estimate
    difference: Estimate
    low: float  # one-sided 95% bounds of the difference; the lower one is corrected for the reference's winner's curse
    high: float
    further: Estimate | None  # the difference that a further seed would show; None where seed noise was not measured
    within: bool  # taken as enough: shown by the upper bound, or by the mean alone in a point reading
    non_inferior: bool | None  # True: shown to be enough; False: shown not to be; None: inconclusive
    threshold: float  # the smallest margin at which the rank is taken as enough


@dataclass(frozen=True, slots=True)
class Comparison:
    """All ranks against the reference at one margin, and the rank that the rule chooses."""

    evidence: Evidence
    by_rank: dict[int, Compared]  # by rank; the base is rank 0
    margin: float  # oriented unit
    chosen: int
    confidence: float | None = None  # the probability that was asked for, where it chose the rank

    @property
    def reference(self) -> Contender:
        return self.evidence.reference

    @property
    def ranks(self) -> list[int]:
        """The ranks tried, ascending, without the base."""
        return sorted(self.evidence.contenders)

    def probability(self, rank: int) -> float | None:
        """That the rank is enough; None where the evidence gives none."""
        return self.evidence.probability(rank, self.margin)

    def likely(self, rank: int) -> float:
        """`probability` where the evidence gives one."""
        probability = self.probability(rank)
        assert probability is not None
        return probability

    def at_confidence(self, confidence: float) -> Comparison:
        """With the smallest rank whose probability is at least `confidence`, else the likeliest; as it is without probabilities, where bounds decide."""
        if self.evidence.no_probability:
            return self
        enough = [rank for rank in self.ranks if self.likely(rank) >= confidence]
        chosen = min(enough, default=max(self.ranks, key=lambda rank: (self.likely(rank), -rank)))
        return replace(self, chosen=chosen, confidence=confidence)

    @property
    def base_is_enough(self) -> bool:
        if 0 not in self.by_rank:
            return False
        return self.by_rank[0].within if self.confidence is None else self.likely(0) >= self.confidence

    @property
    def is_indication(self) -> bool:
        """Whether a rank that the answer rests on was compared with the reference on fewer than two seeds."""
        if self.evidence.basis == "std":
            return False  # the table states the noise over seeds
        if self.chosen == self.reference.rank and len(self.reference.cells) < 2:
            return True
        answer = {self.chosen, self.next_lower or self.chosen} - {self.reference.rank}
        return any(self.by_rank[rank].difference.seeds < 2 for rank in answer)

    @property
    def rests_on_examples(self) -> bool:
        """Whether examples alone speak for the answer, so that further seeds make it a decision."""
        return self.is_indication and self.evidence.has_examples

    @property
    def next_lower(self) -> int | None:
        """The highest rank below the chosen one."""
        return max((rank for rank in self.ranks if rank < self.chosen), default=None)

    def is_worse(self, rank: int) -> bool:
        """Whether the rank is shown to be worse than the margin allows, or probably is, or is read to be in a point reading."""
        compared = self.by_rank[rank]
        if self.confidence is not None and self.likely(rank) <= 1 - self.confidence:
            return True
        return not compared.within if self.evidence.is_point_reading else compared.non_inferior is False

    def is_clearly_worse(self, rank: int) -> bool:
        """Whether the rank is `is_worse` with a probability of `CONFIDENCE`, where it has any."""
        is_likely = self.confidence is not None and self.likely(rank) > 1 - CONFIDENCE
        return self.is_worse(rank) and not (is_likely and self.by_rank[rank].non_inferior is not False)


def compare(evidence: Evidence, margin: float) -> Comparison:
    """Compare every rank, and the base if the table has it, and walk down from the reference."""
    everyone = ([evidence.base] if evidence.base else []) + list(evidence.contenders.values())
    by_rank = {contender.rank: _compared(contender, evidence, margin) for contender in everyone}
    chosen = walk_down(by_rank, evidence.reference.rank, lambda rank: by_rank[rank].within)
    return Comparison(evidence, by_rank, margin, chosen)


def _compared(contender: Contender, evidence: Evidence, margin: float) -> Compared:
    mean = evidence.value(contender)
    if contender.rank == evidence.reference.rank:
        return Compared(contender, mean, ITSELF, 0.0, 0.0, None, True, True, 0.0)
    difference, gap = evidence.difference(contender), evidence.reference_gap
    bounds = Bounds(difference.mean, difference.bound(1 - CONFIDENCE) - gap, difference.bound(CONFIDENCE))
    decides = bounds.mean if evidence.is_point_reading else bounds.high
    further = difference.of_a_further_seed() if evidence.measures_seeds and contender.rank > 0 else None
    return Compared(
        contender,
        mean,
        difference,
        bounds.low,
        bounds.high,
        further,
        is_within(decides, margin),
        None if evidence.basis == "values" else bounds.is_enough(margin),
        max(decides, 0.0),
    )


def staircase(tested: Comparison, unit: Unit) -> list[StaircaseStep]:
    """The chosen rank as a step function of the margin: a step at each margin from which a smaller rank is enough."""
    by_bounds = tested.confidence is None
    steps = [StaircaseStep(margin=0.0, rank=tested.reference.rank if by_bounds else tested.ranks[-1])]
    for threshold, rank in _walked(tested) if by_bounds else _likely(tested):
        margin = unit.difference(threshold)
        if rank >= steps[-1].rank:
            continue
        if margin == steps[-1].margin:
            steps.pop()  # the smaller rank replaces a larger one at the same margin
        steps.append(StaircaseStep(margin=margin, rank=rank))
    return steps


def _walked(tested: Comparison) -> Iterator[tuple[float, int]]:
    """Margin and rank: where the walk down reaches it."""
    threshold = 0.0
    for rank in descending(tested.by_rank, tested.reference.rank):
        threshold = max(threshold, tested.by_rank[rank].threshold)
        yield threshold, rank


def _likely(tested: Comparison) -> list[tuple[float, int]]:
    """Margin and rank by ascending margin: where it has the confidence. The base is no rank to answer with."""
    assert tested.confidence is not None
    return sorted((margin, rank) for rank, margin in tested.evidence.margins_at(tested.confidence).items())
