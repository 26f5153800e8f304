"""What the cells of a table say of each rank: its mean, its paired difference from the reference, and how sure.

What the data hold decides what an interval rests on:

    items and seeds   both vary: the closed form of two crossed factors
    items             one seed: items are measured, the seeds' part is a published floor
    seeds             one number a training, two or more trainings at a rank
    std               one number a rank with a stated deviation
    values            one number a rank and nothing else: scatter about the curve, at least the published floor
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rightrank.decision.metrics import published_deviation
from rightrank.decision.table import Cell, ScoreTable
from rightrank.maths.curve import fit_power
from rightrank.maths.intervals import Estimate, estimate, seed_parts, winners_gap
from rightrank.records import Basis

Floats = NDArray[np.float64]

LEAST_CURVE_RANKS = 4  # scatter about the three-parameter law needs one more


@dataclass(frozen=True, slots=True)
class Contender:
    """One rank at its best learning rate."""

    rank: int
    rate: float
    cells: Mapping[int, Cell]  # by seed
    loss: float  # oriented mean over seeds: lower is better
    gap: float = 0.0  # how optimistic `loss` is, for being the best of several rates

    @property
    def fair_loss(self) -> float:
        """The loss with the winner's optimism taken out."""
        return self.loss + self.gap


@dataclass(frozen=True, slots=True)
class SeedNoise:
    """Variances over seeds of one training's mean."""

    common: float  # shared by all ranks of a seed
    common_degrees: float
    own: float  # of each rank: a paired difference has twice this
    own_degrees: float  # 0: stated or published, not measured


class Evidence:
    """A table read once. Everything is in the oriented unit: lower is better, nats for a perplexity."""

    def __init__(self, table: ScoreTable) -> None:
        self.table = table
        rates = {rank: _best_rate(table, rank) for rank in table.ranks()}
        bare = {rank: _contender(table, rank, rate) for rank, rate in rates.items()}
        self._bare = bare
        self.contenders = {rank: self._with_gap(contender) for rank, contender in bare.items()}
        self.base = _contender(table, 0, _best_rate(table, 0)) if table.rates(0) else None
        self.reference = min(self.contenders.values(), key=lambda contender: (contender.fair_loss, contender.rank))

    @cached_property
    def basis(self) -> Basis:
        items = all(cell.items for contender in self._bare.values() for cell in contender.cells.values())
        seeds = max(len(contender.cells) for contender in self._bare.values())
        if items:
            return "items and seeds" if seeds > 1 else "items"
        if seeds > 1:
            return "seeds"
        stated = [cell.deviation for contender in self._bare.values() for cell in contender.cells.values()]
        return "std" if any(deviation is not None for deviation in stated) else "values"

    @cached_property
    def noise(self) -> SeedNoise:
        if self.basis in ("items and seeds", "seeds"):
            return measured_noise(list(self._bare.values()))
        if self.basis == "items" and self.table.kind in ("loss", "other"):
            return SeedNoise(0.0, 0.0, 0.0, 0.0)  # nothing is published on such a number: said, not guessed
        floor = published_deviation(self.table.kind, self._level, self.table.values()) ** 2
        if self.basis == "values":
            floor = max(floor, curve_scatter(list(self._bare.values()), floor**0.5) ** 2)
        return SeedNoise(0.0, 0.0, floor, 0.0)

    @cached_property
    def covariance(self) -> Floats:
        """[ranks, ranks] of the noise of the ranks' means, without what all ranks share."""
        contenders = [self.contenders[rank] for rank in sorted(self.contenders)]
        columns = [list(contender.cells.values()) for contender in contenders]
        stated = [self._stated(contender) for contender in contenders]
        own = [self.noise.own / len(column) for column in columns]
        seeds = np.diag([ours if given is None else given for given, ours in zip(stated, own, strict=True)])
        covariance: Floats = seeds + _items_part(columns)
        return covariance

    @cached_property
    def reference_gap(self) -> float:
        """How optimistic the reference is for being the best of all ranks: differences from it look larger than they are.

        It makes the test of "enough" conservative, and must be taken out before a rank is called not enough.
        """
        means = np.array([self.contenders[rank].fair_loss for rank in sorted(self.contenders)])
        return winners_gap(means, self.covariance)

    @property
    def _level(self) -> float:
        return min(contender.loss for contender in self._bare.values())

    def value(self, contender: Contender) -> Estimate:
        """The contender's own mean."""
        found = _estimate(list(contender.cells.values()))
        if contender.rank == 0:
            return found
        stated = self._stated(contender)
        if stated is not None:
            return found.with_seeds(stated, 0.0)
        noise, seeds = self.noise, len(contender.cells)
        variance = (noise.common + noise.own) / seeds
        degrees = _satterthwaite([(noise.common, noise.common_degrees), (noise.own, noise.own_degrees)])
        return found.with_seeds(max(variance, found.both_variance), degrees)

    def difference(self, contender: Contender, reference: Contender | None = None) -> Estimate:
        """How much worse the contender is than the reference: paired over items, and over seeds where both have them."""
        against = reference or self.reference
        pairs = _pairs(contender, against)
        found = _estimate(pairs, shift=contender.gap - against.gap)
        noise, seeds = self.noise, len(pairs)
        stated = [self._stated(contender), self._stated(against)]
        if all(variance is not None for variance in stated):
            return found.with_seeds(sum(variance for variance in stated if variance is not None), 0.0)
        if contender.rank == 0 or against.rank == 0:
            variance = (noise.common + noise.own) / seeds
            degrees = _satterthwaite([(noise.common, noise.common_degrees), (noise.own, noise.own_degrees)])
            return found.with_seeds(max(variance, found.both_variance), degrees)
        return found.with_seeds(max(2 * noise.own / seeds, found.both_variance), noise.own_degrees)

    def _stated(self, contender: Contender) -> float | None:
        """The variance of the contender's mean that the table states; None where it measures seeds, or states none."""
        if self.basis != "std":
            return None
        cell = next(iter(contender.cells.values()))
        return None if cell.deviation is None else cell.deviation**2 / cell.deviation_seeds

    def _with_gap(self, contender: Contender) -> Contender:
        gap = self._gap(contender.rank)
        return Contender(contender.rank, contender.rate, contender.cells, contender.loss, gap)

    def _gap(self, rank: int) -> float:
        """Of the best of the rank's rates: from the noise of the differences between its rates."""
        rates = self.table.rates(rank)
        if len(rates) < 2:
            return 0.0
        columns = [self.table.column(rank, rate) for rate in rates]
        means = np.array([np.mean([cell.loss for cell in column]) for column in columns])
        own = self.noise.own
        covariance = np.diag([own / len(column) for column in columns])
        return winners_gap(means, covariance + _items_part(columns))


def measured_noise(contenders: list[Contender]) -> SeedNoise:
    """Seed noise from the ranks that have two seeds or more, pooled over ranks.

    Where those ranks share two seeds or more, the seeds' common level is told apart from each rank's own noise.
    """
    several = [contender for contender in contenders if len(contender.cells) > 1]
    shared = sorted(set.intersection(*(set(contender.cells) for contender in several)))
    if len(several) > 1 and len(shared) > 1:
        means = np.array([[contender.cells[seed].loss for seed in shared] for contender in several])
        common, own = seed_parts(means)
        pure = max(0.0, common - own / len(several))
        return SeedNoise(pure, len(shared) - 1.0, own, (len(several) - 1.0) * (len(shared) - 1.0))
    squares = sum(float(np.var([cell.loss for cell in c.cells.values()], ddof=1)) * (len(c.cells) - 1) for c in several)
    degrees = float(sum(len(contender.cells) - 1 for contender in several))
    return SeedNoise(0.0, 0.0, squares / degrees, degrees)


def curve_scatter(contenders: list[Contender], floor: float) -> float:
    """The standard deviation of bare values about the power law; 0 with too few ranks to tell."""
    if len(contenders) < LEAST_CURVE_RANKS:
        return 0.0
    ordered = sorted(contenders, key=lambda contender: contender.rank)
    ranks = np.array([float(contender.rank) for contender in ordered])
    losses = np.array([contender.loss for contender in ordered])
    deviations = np.full(len(ranks), max(floor, 1e-12))
    residuals = losses - fit_power(ranks, losses[None, :], deviations).at(ranks)[0]
    return float(np.sqrt((residuals**2).sum() / (len(ranks) - 3)))


def _best_rate(table: ScoreTable, rank: int) -> float:
    """The rate with the best mean over seeds, the lower one on ties."""
    return min(table.rates(rank), key=lambda rate: (_mean_loss(table.column(rank, rate)), rate))


def _mean_loss(cells: list[Cell]) -> float:
    return float(np.mean([cell.loss for cell in cells]))


def _contender(table: ScoreTable, rank: int, rate: float) -> Contender:
    cells = {seed: table.cells[rank, rate, seed] for seed in table.seeds(rank, rate)}
    return Contender(rank, rate, cells, _mean_loss(list(cells.values())))


def _estimate(cells: list[Cell], shift: float = 0.0) -> Estimate:
    weights = cells[0].weights
    found = estimate(np.stack([cell.sums for cell in cells]), weights)
    if shift == 0.0:
        return found
    return Estimate(
        found.mean + shift,
        found.items_variance,
        found.seeds_variance,
        found.both_variance,
        found.items,
        found.seeds,
        found.seeds_degrees,
        found.skewness,
    )


def _pairs(contender: Contender, against: Contender) -> list[Cell]:
    """Differences by shared seed; in order where none is shared; the base's one evaluation pairs with every seed."""
    left, right = contender.cells, against.cells
    if contender.rank == 0 and len(left) == 1:
        both = [(next(iter(left.values())), cell) for cell in right.values()]
    elif against.rank == 0 and len(right) == 1:
        both = [(cell, next(iter(right.values()))) for cell in left.values()]
    elif shared := sorted(left.keys() & right.keys()):
        both = [(left[seed], right[seed]) for seed in shared]
    else:
        both = list(zip(left.values(), right.values(), strict=False))
    return [Cell(a.trial_id, a.value - b.value, a.sums - b.sums, a.weights) for a, b in both]


def _items_part(columns: list[list[Cell]]) -> Floats:
    """[columns, columns] covariance that items give the columns' means, without what all share; 0 without items."""
    if not all(cell.items for column in columns for cell in column):
        return np.zeros((len(columns), len(columns)))
    weights = columns[0][0].weights
    sums = np.stack([np.mean([cell.sums for cell in column], axis=0) for column in columns])
    influence = (sums - np.outer(sums.sum(axis=1) / weights.sum(), weights)) / weights.mean()
    influence = influence - influence.mean(axis=0)
    items = influence.shape[1]
    covariance: Floats = influence @ influence.T / (items * (items - 1))
    return covariance


def _satterthwaite(parts: list[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of variances with these; 0 where nothing was measured."""
    squares = sum(variance**2 / degrees for variance, degrees in parts if degrees > 0)
    whole = sum(variance for variance, _ in parts)
    return whole**2 / squares if squares > 0 else 0.0
