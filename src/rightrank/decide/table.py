"""Finished trials as a table: rank × learning rate × seed, each cell with its item scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rightrank.records import MetricName, TrialFinished, TrialOutcome

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Cell:
    """One finished trial. Scores are oriented so that lower is better."""

    trial_id: str
    value: float  # as measured, in the metric's own direction
    sums: Floats  # [items] oriented score of each item, summed over its tokens
    weights: Floats  # [items] tokens of each item, or ones
    train_value: float | None

    @property
    def loss(self) -> float:
        """The oriented mean: lower is better."""
        return float(self.sums.sum() / self.weights.sum())


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """Cells by (rank, learning rate, seed); `missing` counts the trials of a rank that gave no result."""

    metric: str
    higher_is_better: bool
    cells: Mapping[tuple[int, float, int], Cell]
    missing: Mapping[int, int]

    def ranks(self) -> list[int]:
        """All ranks with a finished trial, ascending, the base left out."""
        return sorted({rank for rank, _, _ in self.cells if rank > 0})

    def rates(self, rank: int) -> list[float]:
        return sorted({rate for r, rate, _ in self.cells if r == rank})

    def seeds(self, rank: int, rate: float) -> list[int]:
        return sorted(seed for r, lr, seed in self.cells if (r, lr) == (rank, rate))

    def column(self, rank: int, rate: float) -> list[Cell]:
        """The cells of one rank at one rate, by seed."""
        return [self.cells[rank, rate, seed] for seed in self.seeds(rank, rate)]


def table_of(outcomes: Iterable[TrialOutcome], metric: MetricName) -> ScoreTable:
    """The table of a run's outcomes."""
    cells: dict[tuple[int, float, int], Cell] = {}
    missing: dict[int, int] = {}
    for outcome in outcomes:
        if isinstance(outcome, TrialFinished):
            cells[outcome.rank, outcome.learning_rate, outcome.seed] = _cell(outcome, metric)
        else:
            missing[outcome.rank] = missing.get(outcome.rank, 0) + 1
    return ScoreTable(metric, metric == "accuracy", cells, missing)


def _cell(trial: TrialFinished, metric: MetricName) -> Cell:
    if metric == "accuracy" and trial.item_correct is not None:
        sums = -np.asarray(trial.item_correct, dtype=np.float64)
        weights = np.ones_like(sums)
    else:
        sums = np.asarray(trial.item_losses, dtype=np.float64)
        weights = np.asarray(trial.item_tokens, dtype=np.float64)
    return Cell(trial.trial_id, trial.metrics[metric], sums, weights, trial.train_value)
