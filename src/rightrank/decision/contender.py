"""The ranks of a table, each at its best learning rate, and the pairs of cells that compare two of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from rightrank.decision.seed_noise import adjusted_means, best_learning_rate
from rightrank.decision.table import Cell, ScoreTable
from rightrank.maths.intervals import Estimate, estimate

SURE = 0.95  # with which a learning rate of fewer seeds must win to replace one of more


@dataclass(frozen=True, slots=True)
class Contender:
    """One rank at its best learning rate."""

    rank: int
    learning_rate: float
    cells: Mapping[int, Cell]  # by seed
    loss: float  # oriented mean over seeds: lower is better
    gap: float = 0.0  # the winner's curse: how optimistic `loss` is as the best of several learning rates
    seed_shift: float = 0.0  # of `loss`, to where it would be with the seeds of all ranks

    @property
    def fair_loss(self) -> float:
        """The loss on common terms: the seeds of all ranks, and without the winner's curse."""
        return self.loss + self.seed_shift + self.gap


def losses_by_seed(cells: Mapping[int, Cell]) -> dict[int, float]:
    return {seed: cell.loss for seed, cell in cells.items()}


def cells_by_seed(table: ScoreTable, rank: int, learning_rate: float) -> dict[int, Cell]:
    return {seed: table.cells[rank, learning_rate, seed] for seed in table.seeds(rank, learning_rate)}


def contender_of(table: ScoreTable, rank: int) -> Contender:
    columns = {lr: cells_by_seed(table, rank, lr) for lr in table.learning_rates(rank)}
    best = best_learning_rate(
        {lr: losses_by_seed(cells) for lr, cells in columns.items()}, partial(_is_surely_lower, columns)
    )
    cells = columns[best]
    return Contender(rank, best, cells, float(np.mean([cell.loss for cell in cells.values()])))


def _is_surely_lower(columns: Mapping[float, Mapping[int, Cell]], one: float, other: float) -> bool:
    """Whether one learning rate is shown to be better than another on the seeds that both have.

    One number a training shows no noise: there the means decide.
    """
    return estimate_of(cells_of_shared_seeds(columns[one], columns[other])).bound(SURE) < 0


def on_common_seeds(contenders: list[Contender]) -> dict[int, Contender]:
    adjusted = adjusted_means([losses_by_seed(contender.cells) for contender in contenders])
    return {
        contender.rank: replace(contender, seed_shift=mean - contender.loss)
        for contender, mean in zip(contenders, adjusted, strict=True)
    }


def estimate_of(cells: list[Cell], shift: float = 0.0) -> Estimate:
    found = estimate(np.stack([cell.sums for cell in cells]), cells[0].weights)
    return replace(found, mean=found.mean + shift)


def paired_cells(contender: Contender, against: Contender) -> list[Cell]:
    """Differences by shared seed; in order where no seed is shared. The single evaluation of the base pairs with every seed."""
    left, right = contender.cells, against.cells
    if contender.rank == 0 and len(left) == 1:
        both = [(next(iter(left.values())), cell) for cell in right.values()]
    elif against.rank == 0 and len(right) == 1:
        both = [(cell, next(iter(right.values()))) for cell in left.values()]
    elif left.keys() & right.keys():
        return cells_of_shared_seeds(left, right)
    else:
        both = list(zip(left.values(), right.values(), strict=False))
    return [_minus(a, b) for a, b in both]


def cells_of_shared_seeds(left: Mapping[int, Cell], right: Mapping[int, Cell]) -> list[Cell]:
    return [_minus(left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())]


def _minus(one: Cell, other: Cell) -> Cell:
    return Cell(one.trial_id, one.value - other.value, one.sums - other.sums, one.weights)
