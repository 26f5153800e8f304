"""Finished trials as a table: rank × learning rate × seed, each cell with its item scores or its one number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from rightrank.decision.metrics import MetricKind, kind_of
from rightrank.decision.metrics import higher_is_better as metric_is_higher_better
from rightrank.records import MetricName, Result, ResultsTable, TrialFinished, TrialOutcome

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Cell:
    """One finished trial. Scores are oriented so that lower is better; a perplexity is its logarithm."""

    trial_id: str
    value: float  # as measured, in the metric's own direction
    sums: Floats  # [items] oriented score of each item, summed over its tokens; [1] the score itself without items
    weights: Floats  # [items] tokens of each item, or ones
    train_value: float | None = None
    deviation: float | None = None  # the stated standard deviation over seeds, oriented unit
    deviation_seeds: int = 1  # how many seeds the stated value is the mean of
    seconds: float | None = None  # training and evaluation, as a table states them; of our own runs the report tells
    steps: int | None = None
    points: tuple[tuple[int, float], ...] = ()  # (step, value) along the training, the metric's own direction
    others: Mapping[str, float] = field(default_factory=dict)  # other metrics of the trial, in their own direction

    @property
    def items(self) -> int:
        """Items scored one by one; 0 where there is only the trial's number."""
        return len(self.sums) if len(self.sums) > 1 else 0

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
    missing: Mapping[int, int] = field(default_factory=dict)
    kind: MetricKind = "token_loss"

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

    def values(self) -> list[float]:
        """All values as measured."""
        return [cell.value for cell in self.cells.values()]


def table_of(
    outcomes: Iterable[TrialOutcome],
    metric: MetricName,
    higher_is_better: bool | None = None,
    points_metric: str | None = None,
) -> ScoreTable:
    """The table of a run's outcomes.

    Args:
        outcomes: one without this metric counts as missing.
        metric: one of those that the run measured.
        higher_is_better: None: by the metric's name.
        points_metric: of the evaluations along the trainings; None: this one.
    """
    outcomes = list(outcomes)
    higher = metric_is_higher_better(metric) if higher_is_better is None else higher_is_better
    kind = kind_of(metric, higher)
    scored = [o for o in outcomes if isinstance(o, TrialFinished) and metric in o.metrics]
    by_item = {trial.trial_id: trial.items(metric) for trial in scored}
    if len({0 if items is None else len(items[0]) for items in by_item.values()}) > 1:
        by_item = dict.fromkeys(by_item)  # some trials have no items, or others: no pairs then
    if kind == "perplexity" and not all(trial.metrics[metric] > 0 for trial in scored):
        kind = "other"  # whatever is called one
    cells: dict[tuple[int, float, int], Cell] = {}
    missing: dict[int, int] = {}
    for outcome in outcomes:
        if isinstance(outcome, TrialFinished) and metric in outcome.metrics:
            items = by_item[outcome.trial_id] or ([outcome.metrics[metric]], [1.0])
            cell = _cell(outcome, metric, _oriented(items[0], kind, higher), np.asarray(items[1], dtype=np.float64))
            cell = cell if points_metric in (None, metric) else replace(cell, points=())
            cells[outcome.rank, outcome.learning_rate, outcome.seed] = cell
        else:
            missing[outcome.rank] = missing.get(outcome.rank, 0) + 1
    return ScoreTable(metric, higher, cells, missing, kind)


def _oriented(scores: Sequence[float], kind: MetricKind, higher: bool) -> Floats:
    """Lower is better; perplexities as logarithms."""
    values = np.asarray(scores, dtype=np.float64)
    return np.log(values) if kind == "perplexity" else -values if higher else values


def _cell(trial: TrialFinished, metric: MetricName, sums: Floats, weights: Floats) -> Cell:
    return Cell(
        trial_id=trial.trial_id,
        value=trial.metrics[metric],
        sums=sums,
        weights=weights,
        train_value=trial.train_value,
        steps=trial.steps,
        points=tuple((point.step, point.value) for point in trial.points),
        others={name: value for name, value in trial.metrics.items() if name != metric},
    )


def table_of_results(results: ResultsTable) -> ScoreTable:
    """The table of trainings that others ran."""
    kind = kind_of(results.metric, results.higher_is_better)
    cells: dict[tuple[int, float, int], Cell] = {}
    missing: dict[int, int] = {}
    for result in results.results:
        if result.value is None:
            missing[result.rank] = missing.get(result.rank, 0) + 1
        else:
            cells[result.rank, result.learning_rate, result.seed] = _cell_of_result(
                result, result.value, kind, results.higher_is_better
            )
    return ScoreTable(results.metric, results.higher_is_better, cells, missing, kind)


def _cell_of_result(result: Result, value: float, kind: MetricKind, higher_is_better: bool) -> Cell:
    scores = result.item_values or [value]
    weights = np.asarray(result.item_weights or np.ones(len(scores)), dtype=np.float64)
    deviation = result.std
    if deviation is not None and kind == "perplexity":
        deviation = math.log1p(deviation / value)
    return Cell(
        trial_id=result.trial_id,
        value=value,
        sums=_oriented(scores, kind, higher_is_better) * weights,
        weights=weights,
        train_value=result.train_value,
        deviation=deviation,
        deviation_seeds=result.std_seeds,
        seconds=result.seconds,
        steps=result.steps,
        points=tuple(result.points),
        others=result.others,
    )
