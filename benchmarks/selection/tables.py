"""Replay grids of finished runs to a strategy as if they were being trained.

A grid's id and its truth never reach a strategy: it sees ranks, learning rates, seeds, the margin, and outcomes of the arms that it
requests. What a table does not contain (a truncation, a training stopped early) is returned as a failed trial.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import read_json
from rightrank.decision.adapter import Criterion
from rightrank.decision.comparison import compute_bounds
from rightrank.decision.table import estimate_pairs, pair_cells
from rightrank.schema.errors import ResultsError
from rightrank.schema.trials import (
    Arm,
    EvalPoint,
    TrialFailed,
    TrialFinished,
    TrialOutcome,
    compute_trial_id,
    count_added_steps,
)
from rightrank.search.protocol import Space, Strategy, Trials
from rightrank.search.strategies import Upward

REPLAY_STEPS = 1000  # fractions of a full training, in which costs are counted

SeedGrid = Mapping[int, Mapping[float, Mapping[int, float]]]  # rank → learning rate → seed → value
ExampleValues = Mapping[tuple[int, float, int], list[float]]


@dataclass(frozen=True)
class GridCurve:
    """One exhaustive grid, in the metric's own direction."""

    name: str
    family: str
    higher_is_better: bool
    cells: SeedGrid
    metric: str = "loss"
    base: float | None = None
    base_loss: float | None = None  # if the metric is another
    truncated: SeedGrid = field(default_factory=dict)  # rank → learning rate of the highest rank → seed
    truncated_items: ExampleValues = field(
        default_factory=dict
    )  # summed example losses of truncations, by rank, learning rate of the highest rank, seed
    tests: Mapping[str, SeedGrid] = field(default_factory=dict)  # "trained" or "truncated" → values on the test split
    checkpoints: Mapping[float, SeedGrid] = field(default_factory=dict)  # fraction of a training → values at that time
    losses: Mapping[float, SeedGrid] = field(default_factory=dict)  # the same for losses if the metric is another
    items: ExampleValues = field(default_factory=dict)  # summed example losses, or example scores of another metric
    item_tokens: list[int] = field(default_factory=list)
    energy: Mapping[float, Mapping[int, list[float]]] = field(
        default_factory=dict
    )  # of the highest rank: share of each direction

    @property
    def ranks(self) -> list[int]:
        return sorted(self.cells)

    @property
    def learning_rates(self) -> list[float]:
        return sorted({learning_rate for by_rate in self.cells.values() for learning_rate in by_rate})

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for by_rate in self.cells.values() for by_seed in by_rate.values() for seed in by_seed})

    @property
    def size(self) -> int:
        """Return the number of cells of one seed."""
        return sum(len(by_rate) for by_rate in self.cells.values())

    def loss(self, rank: int, learning_rate: float) -> float:
        """Return the mean over seeds, oriented so that lower is better."""
        mean = float(np.mean(list(self.cells[rank][learning_rate].values())))
        return -mean if self.higher_is_better else mean

    def best(self, rank: int) -> float:
        """Return the rank's loss at its best rate."""
        return min(self.loss(rank, learning_rate) for learning_rate in self.cells[rank])

    def truth(self, margin: float) -> int:
        """Return the full grid's pick: the smallest rank within the margin of the best over all rates."""
        best = min(self.best(rank) for rank in self.ranks)
        return next(rank for rank in self.ranks if self.best(rank) - best <= margin + 1e-9)


def list_seed_orders(curve: GridCurve) -> list[GridCurve]:
    """Return the curve once for each of its seeds, numbered so that this seed comes first. The truth, a mean over seeds, stays the same."""
    count = len(curve.seeds)

    def turned(by: int) -> GridCurve:
        seed_index = {seed: (index - by) % count for index, seed in enumerate(curve.seeds)}

        def grid(cells: SeedGrid) -> SeedGrid:
            return {
                rank: {
                    lr: {seed_index[seed]: value for seed, value in by_seed.items()} for lr, by_seed in by_lr.items()
                }
                for rank, by_lr in cells.items()
            }

        def items(example_values: ExampleValues) -> ExampleValues:
            return {(rank, lr, seed_index[seed]): values for (rank, lr, seed), values in example_values.items()}

        def grids(grids_by_fraction: Mapping[float, SeedGrid]) -> dict[float, SeedGrid]:
            return {fraction: grid(cells) for fraction, cells in grids_by_fraction.items()}

        return replace(
            curve,
            name=f"{curve.name}, seed {curve.seeds[by]} first",
            cells=grid(curve.cells),
            truncated=grid(curve.truncated),
            checkpoints=grids(curve.checkpoints),
            losses=grids(curve.losses),
            tests={kind: grid(cells) for kind, cells in curve.tests.items()},
            items=items(curve.items),
            truncated_items=items(curve.truncated_items),
        )

    return [turned(by) for by in range(count)]


def read_grids(path: Path) -> list[GridCurve]:
    """Read the curves of a file that have a grid.

    Raises:
        ResultsError: the file does not exist, is not of this form, or has no curve with a grid.
    """
    try:
        content = read_json(path)
        curves = [_parse_curve(entry) for entry in content["curves"] if entry.get("lr_grid") or entry.get("seed_grid")]
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}; give a JSON file of grids") from None
    except (lzma.LZMAError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResultsError(
            f'{path}: not a file of grids ({type(error).__name__}: {error}); it holds {{"curves": [{{"id", "ranks", '
            '"higher_is_better", "lr_grid": {rank: {rate: value}}}]}'
        ) from None
    if not curves:
        raise ResultsError(f"{path} has no curve with an lr_grid, so there is nothing to replay")
    return curves


def _parse_curve(entry: Mapping[str, Any]) -> GridCurve:
    seed_grid = entry.get("seed_grid")
    cells = _parse_seed_grid(seed_grid) if seed_grid else _parse_single_seed(entry["lr_grid"])
    if len(cells) < 2:
        raise ValueError(f"{entry.get('id')}: a grid needs two ranks or more")
    return GridCurve(
        name=str(entry.get("id", "")),
        family=str(entry.get("family", "given")),
        higher_is_better=bool(entry.get("higher_is_better", False)),
        cells=cells,
        metric=entry.get("metric", "accuracy" if entry.get("higher_is_better") else "loss"),
        base_loss=entry.get("base_loss"),
        base=entry.get("base") if isinstance(entry.get("base"), int | float) else None,
        truncated=_parse_seed_grid(entry.get("truncation_grid", {})),
        truncated_items=_parse_examples(entry.get("truncation_items", {})),
        checkpoints={
            float(fraction): _parse_seed_grid(grid) for fraction, grid in entry.get("checkpoints", {}).items()
        },
        losses={float(fraction): _parse_seed_grid(grid) for fraction, grid in entry.get("losses", {}).items()},
        tests={kind: _parse_seed_grid(grid) for kind, grid in entry.get("test_grids", {}).items()},
        items=_parse_examples(entry.get("item_losses", {})),
        item_tokens=list(entry.get("item_tokens", [])),
        energy={
            float(learning_rate): {int(seed): shares for seed, shares in by_seed.items()}
            for learning_rate, by_seed in entry.get("energy", {}).items()
        },
    )


def _parse_seed_grid(grid: Mapping[str, Any]) -> dict[int, dict[float, dict[int, float]]]:
    cells: dict[int, dict[float, dict[int, float]]] = {}
    for rank, by_rate in grid.items():
        for learning_rate, by_seed in by_rate.items():
            values = {int(seed): float(value) for seed, value in by_seed.items() if _is_number(value)}
            if values:
                cells.setdefault(int(rank), {})[float(learning_rate)] = values
    return cells


def _parse_examples(grid: Mapping[str, Any]) -> dict[tuple[int, float, int], list[float]]:
    return {
        (int(rank), float(learning_rate), int(seed)): losses
        for rank, by_rate in grid.items()
        for learning_rate, by_seed in by_rate.items()
        for seed, losses in by_seed.items()
    }


def _parse_single_seed(grid: Mapping[str, Any]) -> dict[int, dict[float, dict[int, float]]]:
    return _parse_seed_grid(
        {rank: {learning_rate: {"0": v} for learning_rate, v in by_rate.items()} for rank, by_rate in grid.items()}
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


@dataclass(frozen=True)
class Recommendation:
    """The smallest rank within the margin of the reference, from a strategy's own arms and without intervals."""

    rank: int | None  # None if too few trials have finished
    learning_rate: float | None
    reference_rank: int | None


def recommend(strategy: Strategy, outcomes: Sequence[TrialOutcome]) -> Recommendation:
    """Return the rank that the outcomes support best. The decision, which has intervals, may differ."""
    trials = strategy.replay_trials(outcomes)
    rank = _find_smallest_unbeaten(strategy, trials) if isinstance(strategy, Upward) else trials.find_smallest_rank()
    learning_rate = None if rank is None else trials.find_best_learning_rate(rank)
    return Recommendation(rank, learning_rate, trials.find_reference())


def _find_smallest_unbeaten(strategy: Upward, trials: Trials) -> int | None:
    """Return the smallest rank that no higher one is shown to beat by more than the margin."""
    chosen: int | None = None
    for rank in sorted(trials.list_ranks()):
        if chosen is None or (strategy.has_gain(trials, rank, [chosen]) and _is_surely_better(trials, rank, chosen)):
            chosen = rank
    return chosen


def _is_surely_better(trials: Trials, rank: int, other_rank: int) -> bool:
    """Return whether the bound over examples shows the rank to be better; True without examples."""
    assert trials.evidence is not None
    pairs = pair_cells(*(trials.evidence.contenders[compared] for compared in (rank, other_rank)))
    return not pairs[0][0].examples or compute_bounds(estimate_pairs(pairs)).high < 0


@dataclass(frozen=True)
class Replayed:
    """The result of a strategy on a grid."""

    answer: Recommendation
    trainings: float  # cost in full trainings
    arms: int
    outcomes: tuple[TrialOutcome, ...] = ()


class TableRunner:
    """A runner that answers arms from a grid."""

    def __init__(self, curve: GridCurve) -> None:
        self._curve = curve
        self._arms: dict[str, Arm] = {}

    def run(self, arm: Arm) -> TrialOutcome:
        identity = compute_trial_id("replay", arm)
        self._arms[identity] = arm
        value = self._get_value(arm)
        if value is None:
            return TrialFailed(trial_id=identity, **arm.model_dump(), error="error", reason="not in the table")
        items, loss = self._get_example_values(arm), self._get_loss(arm)
        metric = self._curve.metric
        is_loss = metric == "loss"
        return TrialFinished(
            trial_id=identity,
            **arm.model_dump(),
            value=value,
            metrics={metric: value} | ({} if loss is None else {"loss": loss}),
            example_losses=items if is_loss else [],
            example_tokens=self._curve.item_tokens if items and is_loss else [],
            example_scores=items if items and not is_loss else None,
            points=self._build_points(arm),
            trainable_parameters=arm.rank,
        )

    def _build_points(self, arm: Arm) -> list[EvalPoint]:
        """Return the values during a full training that the table contains."""
        key = arm.rank, arm.learning_rate, arm.seed
        values = {fraction: _get_cell(grid, key) for fraction, grid in self._curve.checkpoints.items() if arm.is_direct}
        return [
            EvalPoint(step=round(fraction * arm.steps), value=value, train_value=None)
            for fraction, value in sorted(values.items())
            if value is not None
        ]

    def _get_value(self, arm: Arm) -> float | None:
        curve = self._curve
        if arm.rank == 0:
            return curve.base
        key = self._get_key(arm)
        if arm.truncate_from is not None:
            return _get_cell(curve.truncated, key)
        if arm.stop_at is not None:
            return _get_cell(curve.checkpoints.get(arm.stop_at / arm.steps, {}), key)
        return _get_cell(curve.cells, key)

    def _get_key(self, arm: Arm) -> tuple[int, float, int]:
        """Return the cell of an arm."""
        parent = None if arm.truncate_from is None else self._arms[arm.truncate_from]
        return arm.rank, (parent or arm).learning_rate, arm.seed

    def _get_example_values(self, arm: Arm) -> list[float]:
        if arm.stop_at is not None:
            return []
        grid = self._curve.items if arm.truncate_from is None else self._curve.truncated_items
        return grid.get(self._get_key(arm), [])

    def _get_loss(self, arm: Arm) -> float | None:
        """Return the loss of a training whose metric is another."""
        curve = self._curve
        if curve.metric == "loss" or arm.truncate_from is not None:
            return None
        if arm.rank == 0:
            return curve.base_loss
        key = self._get_key(arm)
        return _get_cell(curve.losses.get((arm.stop_at or arm.steps) / arm.steps, {}), key)


def _get_cell(grid: SeedGrid, key: tuple[int, float, int]) -> float | None:
    return grid.get(key[0], {}).get(key[1], {}).get(key[2])


def build_space(curve: GridCurve, margin: float, seeds: int = 1) -> Space:
    """Return the space of a grid: everything that a strategy is told about it."""
    return Space(
        ranks=tuple(curve.ranks),
        learning_rates=tuple(curve.learning_rates),
        seeds=tuple(curve.seeds[:seeds]),
        lora_alpha=32.0,
        steps=REPLAY_STEPS,
        criterion=Criterion(
            curve.metric,
            curve.higher_is_better,
            margin,
            "loss" if curve.metric == "loss" else "token_loss",
            trusts_values=not curve.truncated_items,
        ),
        goal="training-rank",
        can_truncate=bool(curve.truncated),
    )


def replay(curve: GridCurve, make: Callable[[Space], Strategy], space: Space) -> Replayed:
    """Run a strategy on a grid to its end."""
    strategy, runner = make(space), TableRunner(curve)
    outcomes: list[TrialOutcome] = []
    finished: dict[str, TrialFinished] = {}
    steps = 0
    while arms := strategy.replay_trials(outcomes).waiting:
        for arm in arms:
            outcome = runner.run(arm)
            if isinstance(outcome, TrialFinished):
                steps += count_added_steps(arm, finished)
                finished[outcome.trial_id] = outcome
            outcomes.append(outcome)
    return Replayed(recommend(strategy, outcomes), steps / REPLAY_STEPS, len(outcomes), tuple(outcomes))
