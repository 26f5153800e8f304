"""The evidence in a table: the mean of each rank, its paired difference from the reference, and their uncertainty.

The data decide what an interval rests on (`Evidence.basis`):

    items and seeds   examples and seeds vary: the closed form of two crossed factors
    items             one seed: the examples are measured, and a published seed noise is added
    seeds             one number a training, two or more trainings at a rank
    std               one number a rank with a stated standard deviation
    values            one number a rank and no deviation: scatter about the curve, at least the published seed noise
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rightrank.decision.metrics import published_deviation
from rightrank.decision.table import Cell, ScoreTable
from rightrank.maths.curve import fit_power
from rightrank.maths.intervals import Estimate, estimate, seed_parts, winners_gap
from rightrank.records import Basis

Floats = NDArray[np.float64]

MIN_CURVE_RANKS = 4  # one more than the power law has parameters


@dataclass(frozen=True, slots=True)
class Contender:
    """One rank at its best learning rate."""

    rank: int
    learning_rate: float
    cells: Mapping[int, Cell]  # by seed
    loss: float  # oriented mean over seeds: lower is better
    gap: float = 0.0  # the winner's curse: how optimistic `loss` is as the best of several learning rates

    @property
    def fair_loss(self) -> float:
        """The loss corrected for the winner's curse."""
        return self.loss + self.gap


@dataclass(frozen=True, slots=True)
class SeedNoise:
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
        self._bare = {rank: _contender(table, rank) for rank in table.ranks()}
        self.contenders = {rank: replace(found, gap=self._gap(rank)) for rank, found in self._bare.items()}
        self.base = _contender(table, 0) if table.learning_rates(0) else None
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

    @cached_property
    def noise(self) -> SeedNoise:
        if self.basis in ("items and seeds", "seeds"):
            return measured_noise(list(self._bare.values()))
        if self.basis == "items" and self.table.kind in ("loss", "other"):
            return SeedNoise(0.0, 0.0, 0.0, 0.0)  # no noise is published for such a metric; `basis_note` states it
        level = min(contender.loss for contender in self._bare.values())
        floor = published_deviation(self.table.kind, level, self.table.values()) ** 2
        if self.basis == "values":
            floor = max(floor, curve_scatter(list(self._bare.values()), floor**0.5) ** 2)
        return SeedNoise(0.0, 0.0, floor, 0.0)

    @cached_property
    def covariance(self) -> Floats:
        """[ranks, ranks] covariance of the noise of the ranks' means, without the part that all ranks share."""
        contenders = [self.contenders[rank] for rank in sorted(self.contenders)]
        columns = [list(contender.cells.values()) for contender in contenders]
        stated = [self._stated(contender) for contender in contenders]
        measured = [self.noise.individual / len(column) for column in columns]
        seeds = np.diag([ours if given is None else given for given, ours in zip(stated, measured, strict=True)])
        covariance: Floats = seeds + _examples_part(columns)
        return covariance

    @cached_property
    def reference_gap(self) -> float:
        """The winner's curse of the reference as the best of all ranks: differences from it look larger than they are.

        The test of "enough" is conservative by this amount. It is taken out before a rank is called not enough.
        """
        means = np.array([self.contenders[rank].fair_loss for rank in sorted(self.contenders)])
        return winners_gap(means, self.covariance)

    def value(self, contender: Contender) -> Estimate:
        """The contender's own mean."""
        found = _estimate(list(contender.cells.values()))
        if contender.rank == 0:
            return found
        stated = self._stated(contender)
        if stated is not None:
            return found.with_seeds(stated, 0.0)
        variance, degrees = self.noise.of_mean(len(contender.cells))
        return found.with_seeds(max(variance, found.interaction_variance), degrees)

    def difference(self, contender: Contender, reference: Contender | None = None) -> Estimate:
        """How much worse the contender is than the reference, paired over examples, and over seeds that both have."""
        against = reference or self.reference
        pairs = _pairs(contender, against)
        found = _estimate(pairs, shift=contender.gap - against.gap)
        stated = [self._stated(contender), self._stated(against)]
        if all(variance is not None for variance in stated):
            return found.with_seeds(sum(variance for variance in stated if variance is not None), 0.0)
        if contender.rank == 0 or against.rank == 0:
            variance, degrees = self.noise.of_mean(len(pairs))
        else:
            variance, degrees = 2 * self.noise.individual / len(pairs), self.noise.individual_degrees
        return found.with_seeds(max(variance, found.interaction_variance), degrees)

    def _stated(self, contender: Contender) -> float | None:
        """The variance of the contender's mean that the table states, if the evidence rests on stated deviations."""
        if self.basis != "std":
            return None
        cell = next(iter(contender.cells.values()))
        return None if cell.deviation is None else cell.deviation**2 / cell.deviation_seeds

    def _gap(self, rank: int) -> float:
        """The winner's curse of the best of the rank's learning rates."""
        columns = [self.table.column(rank, lr) for lr in self.table.learning_rates(rank)]
        if len(columns) < 2:
            return 0.0
        means = np.array([_mean_loss(column) for column in columns])
        seeds = np.diag([self.noise.individual / len(column) for column in columns])
        return winners_gap(means, seeds + _examples_part(columns))


def measured_noise(contenders: list[Contender]) -> SeedNoise:
    """Seed noise from the ranks with two seeds or more, pooled over ranks.

    Where two of these ranks or more share two seeds or more, the common part is separated from the individual one.
    """
    several = [contender for contender in contenders if len(contender.cells) > 1]
    shared = sorted(set.intersection(*(set(contender.cells) for contender in several)))
    if len(several) > 1 and len(shared) > 1:
        means = np.array([[contender.cells[seed].loss for seed in shared] for contender in several])
        common, individual = seed_parts(means)
        pure = max(0.0, common - individual / len(several))
        return SeedNoise(pure, len(shared) - 1.0, individual, (len(several) - 1.0) * (len(shared) - 1.0))
    squares = sum(float(np.var([cell.loss for cell in c.cells.values()], ddof=1)) * (len(c.cells) - 1) for c in several)
    degrees = float(sum(len(contender.cells) - 1 for contender in several))
    return SeedNoise(0.0, 0.0, squares / degrees, degrees)


def curve_scatter(contenders: list[Contender], floor: float) -> float:
    """The standard deviation of bare values about the power law; 0 below `MIN_CURVE_RANKS` ranks."""
    if len(contenders) < MIN_CURVE_RANKS:
        return 0.0
    ordered = sorted(contenders, key=lambda contender: contender.rank)
    ranks = np.array([float(contender.rank) for contender in ordered])
    losses = np.array([contender.loss for contender in ordered])
    deviations = np.full(len(ranks), max(floor, 1e-12))
    residuals = losses - fit_power(ranks, losses[None, :], deviations).at(ranks)[0]
    return float(np.sqrt((residuals**2).sum() / (len(ranks) - 3)))


def _mean_loss(cells: list[Cell]) -> float:
    return float(np.mean([cell.loss for cell in cells]))


def _contender(table: ScoreTable, rank: int) -> Contender:
    """The rank at the learning rate with the best mean over seeds, the lower one on ties."""
    losses = {lr: _mean_loss(table.column(rank, lr)) for lr in table.learning_rates(rank)}
    best = min(losses, key=lambda lr: (losses[lr], lr))
    cells = {seed: table.cells[rank, best, seed] for seed in table.seeds(rank, best)}
    return Contender(rank, best, cells, losses[best])


def _estimate(cells: list[Cell], shift: float = 0.0) -> Estimate:
    found = estimate(np.stack([cell.sums for cell in cells]), cells[0].weights)
    return replace(found, mean=found.mean + shift)


def _pairs(contender: Contender, against: Contender) -> list[Cell]:
    """Differences by shared seed; in order where no seed is shared. The single evaluation of the base pairs with every seed."""
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


def _examples_part(columns: list[list[Cell]]) -> Floats:
    """[columns, columns] covariance of the columns' means over examples, without the shared part; 0 without examples."""
    if not all(cell.examples for column in columns for cell in column):
        return np.zeros((len(columns), len(columns)))
    weights = columns[0][0].weights
    sums = np.stack([np.mean([cell.sums for cell in column], axis=0) for column in columns])
    influence = (sums - np.outer(sums.sum(axis=1) / weights.sum(), weights)) / weights.mean()
    influence = influence - influence.mean(axis=0)
    examples = influence.shape[1]
    covariance: Floats = influence @ influence.T / (examples * (examples - 1))
    return covariance
