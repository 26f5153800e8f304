"""Finished trials as a table of rank × learning rate × seed. A cell has the scores of its examples, or one number.

Trainings that fell far below their own best are missing values: no evidence, and nothing of them is handed over.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from rightrank.decision.comparison import INDEPENDENT, TIE, Estimate, bounds_of, estimate, span_of
from rightrank.schema.decision import DifferenceSpread, Result, ResultsTable
from rightrank.schema.metrics import Checkpoint, LossKind, MetricKind, direction, metric_kind
from rightrank.schema.trials import (
    EvalPoint,
    Floats,
    Groups,
    MetricName,
    TrialCollapsed,
    TrialFailed,
    TrialFinished,
    TrialOutcome,
)

SPREAD_MARGINS = 10.0  # a difference of one example that is named: the mean of a rare one is within the margin
DROP_IN_MARGINS = 2.5  # the fall that counts as a collapse: five points at a margin of two
SURE_DEVIATIONS = 3.0  # of the paired fall over examples: the best of several looks is optimistic by about two
RIDGE = 1e-4  # keeps seed effects at 0 where the seeds that rows share do not determine them


@dataclass(frozen=True)
class Cell:
    """One finished trial. Scores are oriented so that lower is better; a perplexity is its logarithm."""

    trial_id: str
    value: float  # as measured, in the metric's own direction
    sums: Floats  # [examples] oriented score of each example times its weight; [1] the score without examples
    weights: Floats  # [examples] tokens of each example, or ones
    span: float = 0.0  # the range of one example's score; 0 for losses, which have no bound
    train_value: float | None = None
    deviation: float | None = None  # the stated standard deviation over seeds, oriented unit
    deviation_seeds: int = 1  # how many seeds the stated value is the mean of
    steps: int | None = None
    kept_step: int | None = None  # of the value, where it is not the last evaluation's
    points: tuple[EvalPoint, ...] = ()  # along the training, the metric's own direction
    others: Mapping[str, float] = field(default_factory=dict)  # other metrics of the trial, in their own direction
    groups: Groups | None = None  # [examples] which of them belong together; None: each stands for itself
    train_seconds: float = 0.0  # 0: not known
    eval_seconds: float = 0.0  # of one evaluation

    @property
    def examples(self) -> int:
        """The number of examples; 0 if there is only one number for the trial."""
        return len(self.sums) if len(self.sums) > 1 else 0

    @property
    def units(self) -> int:
        """The number of independent examples: of groups, where there are any."""
        return self.examples if self.groups is None else int(self.groups.max()) + 1

    @property
    def assumption(self) -> str:
        """What bounds over the examples rest on; empty without examples."""
        over = (
            INDEPENDENT
            if self.groups is None
            else f"Bounds are over {self.units:,} groups of {self.examples:,} examples."
        )
        return over if self.examples else ""

    @cached_property
    def loss(self) -> float:
        """The oriented mean: lower is better."""
        return float(self.sums.sum() / self.weights.sum())


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """Cells by (rank, learning rate, seed). `missing` counts the trials of a rank without a result.

    `tried` holds learning rates of trainings that stopped early or diverged: they are no cells, and bound the best one.
    """

    metric: str
    higher_is_better: bool
    cells: Mapping[tuple[int, float, int], Cell]
    missing: Mapping[int, int] = field(default_factory=dict)
    kind: MetricKind = "token_loss"
    tried: Mapping[int, Collection[float]] = field(default_factory=dict)
    collapsed: int = 0  # trials whose held-out value fell far below its own best; they are missing too
    _by_rank: Mapping[int, Mapping[float, Mapping[int, Cell]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_rank: dict[int, dict[float, dict[int, Cell]]] = {}
        for rank, learning_rate, seed in sorted(self.cells):
            of_rate = by_rank.setdefault(rank, {}).setdefault(learning_rate, {})
            of_rate[seed] = self.cells[rank, learning_rate, seed]
        object.__setattr__(self, "_by_rank", by_rank)

    def ranks(self) -> list[int]:
        """The ranks with a finished trial, ascending, without the base."""
        return [rank for rank in self._by_rank if rank > 0]

    def tried_learning_rates(self, rank: int) -> list[float]:
        """Those with a finished trial, and those that were stopped early or diverged."""
        return sorted({*self.by_learning_rate(rank), *self.tried.get(rank, ())})

    def rates_ending_at(self, learning_rate: float, rank: int) -> list[float]:
        """Return several tried learning rates whose lowest or highest is this best one of the rank; empty if there are none.

        They are those of the rank, or else those of every rank at which several were tried: most ranks of a search get one
        learning rate, the best of another rank.
        """
        ranks = sorted({*self._by_rank, *self.tried})
        tried = {rank: self.tried_learning_rates(rank) for rank in ranks}
        of_all = sorted({rate for rates in tried.values() if len(rates) > 1 for rate in rates})
        return next((r for r in (tried[rank], of_all) if len(r) > 1 and learning_rate in (r[0], r[-1])), [])

    def by_learning_rate(self, rank: int) -> Mapping[float, Mapping[int, Cell]]:
        """The rank's cells by learning rate and seed, both ascending."""
        return self._by_rank.get(rank, {})

    def values(self) -> list[float]:
        return [cell.value for cell in self.cells.values()]


def table_of(
    outcomes: Iterable[TrialOutcome],
    metric: MetricName,
    higher_is_better: bool,
    points_metric: str | None = None,
    looks: Iterable[TrialOutcome] = (),
    loss: LossKind = "token_loss",
) -> ScoreTable:
    """The table of a run's outcomes.

    Args:
        outcomes: an outcome without this metric counts as missing.
        points_metric: the metric of the evaluations during training; None for `metric`.
        looks: trainings that are not compared, such as those stopped early; their learning rates count as tried.
        loss: what a loss is of.
    """
    outcomes = list(outcomes)
    kind = metric_kind(metric, higher_is_better, loss)
    scored = [o for o in outcomes if isinstance(o, TrialFinished) and metric in o.metrics]
    examples = [trial.items(metric) for trial in scored]
    sizes = {0 if items is None else len(items[0]) for items in examples}
    if len(sizes) > 1 or 0 in sizes:  # trials with other examples, or none, can't be paired
        examples = [([trial.metrics[metric]], [1.0]) for trial in scored]
    if kind == "perplexity" and not all(trial.metrics[metric] > 0 for trial in scored):
        kind = "other"  # a perplexity is above 0
    scores, weights = map(_rows, zip(*examples, strict=True)) if scored else np.ones((2, 0, 1))
    scale = weights if kind == "perplexity" else np.ones(1)  # the logarithm is of the score without its weight
    sums = _oriented(scores / scale, kind, higher_is_better) * scale
    losses = (sums.sum(axis=1) / weights.sum(axis=1)).tolist()
    cells: dict[tuple[int, float, int], Cell] = {}
    for trial, values, oriented, weight, loss in zip(scored, scores, sums, weights, losses, strict=True):
        cell = _cell(trial, metric, oriented, weight, span_of(kind, values, weight))
        vars(cell)["loss"] = loss  # as it computes it; of all trials at once it takes a hundredth of the time
        cells[trial.rank, trial.learning_rate, trial.seed] = cell
    if points_metric not in (None, metric):
        cells = {key: replace(cell, points=()) for key, cell in cells.items()}
    missing = Counter(o.rank for o in outcomes if not isinstance(o, TrialFinished) or metric not in o.metrics)
    collapsed = sum(isinstance(outcome, TrialCollapsed) for outcome in outcomes)
    tried: dict[int, set[float]] = {}
    for outcome in chain(outcomes, looks):
        if outcome.rank > 0 and outcome.truncate_from is None and not isinstance(outcome, TrialFailed):
            tried.setdefault(outcome.rank, set()).add(outcome.learning_rate)
    return ScoreTable(metric, higher_is_better, cells, missing, kind, tried, collapsed)


def groups_of(numbers: Sequence[int] | None, examples: int) -> Groups | None:
    """Group numbers without gaps; None where each of the examples stands for itself."""
    if numbers is None or len(numbers) != examples or len(set(numbers)) in (1, examples):
        return None
    return np.unique(np.asarray(numbers, np.int64), return_inverse=True)[1]


def _rows(lists: Sequence[Sequence[float]]) -> Floats:
    """Lists of one length as a matrix; those that are all equal, such as the tokens of the examples, share a row."""
    if all(values == lists[0] for values in lists):
        return np.broadcast_to(np.asarray(lists[0], dtype=np.float64), (len(lists), len(lists[0])))
    return np.fromiter(chain.from_iterable(lists), dtype=np.float64).reshape(len(lists), -1)


def _oriented(scores: ArrayLike, kind: MetricKind, higher: bool) -> Floats:
    """Scores with lower as better, and perplexities as logarithms."""
    values = np.asarray(scores)
    return np.log(values) if kind == "perplexity" else -values if higher else values


def _cell(trial: TrialFinished, metric: MetricName, sums: Floats, weights: Floats, span: float) -> Cell:
    return Cell(
        trial_id=trial.trial_id,
        value=trial.metrics[metric],
        sums=sums,
        weights=weights,
        span=span,
        groups=groups_of(trial.item_groups, len(weights)),
        train_value=trial.train_value,
        steps=trial.steps,
        train_seconds=trial.train_seconds,
        eval_seconds=trial.eval_seconds / max(1, len(trial.points)),
        kept_step=trial.kept_step,
        points=tuple(trial.points),
        others={name: value for name, value in trial.metrics.items() if name != metric},
    )


def table_of_results(results: ResultsTable) -> ScoreTable:
    kind = metric_kind(results.metric, results.higher_is_better)
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


def other_tables(results: ResultsTable) -> list[ScoreTable]:
    """The same trainings by each other metric of the table whose direction is known, one number a training."""
    tables = []
    for name in dict.fromkeys(name for result in results.results for name in result.others):
        if (higher := direction(name)) is None:
            continue
        rows = [
            result.model_copy(
                update={
                    "value": result.others.get(name),
                    "item_values": [],
                    "item_weights": [],
                    "std": None,
                    "points": [],
                    "others": {},
                }
            )
            for result in results.results
        ]
        tables.append(
            table_of_results(results.model_copy(update={"metric": name, "higher_is_better": higher, "results": rows}))
        )
    return tables


def _cell_of_result(result: Result, value: float, kind: MetricKind, higher_is_better: bool) -> Cell:
    scores = result.item_values or [value]
    weights = np.asarray(result.item_weights or np.ones(len(scores)))
    deviation = result.std
    if deviation is not None and kind == "perplexity":
        deviation = math.log1p(deviation / value)
    return Cell(
        trial_id=result.trial_id,
        value=value,
        sums=_oriented(scores, kind, higher_is_better) * weights,
        weights=weights,
        span=span_of(kind, scores),
        groups=groups_of(result.item_groups, len(weights)),
        train_value=result.train_value,
        deviation=deviation,
        deviation_seeds=result.std_seeds,
        steps=result.steps,
        points=tuple(EvalPoint(step=step, value=value) for step, value in result.points),
        others=result.others,
    )


def at_checkpoint(table: ScoreTable, checkpoint: Checkpoint) -> ScoreTable:
    """The table with each training at its last evaluation or at its best, the earliest of equal ones.

    Scores by example are of the evaluation whose weights were kept: where another one counts, every training counts by its value.
    """
    at = {key: _at(cell, checkpoint, table.higher_is_better) for key, cell in table.cells.items()}
    if all(at[key] is cell for key, cell in table.cells.items()):
        return table
    bare = {
        key: replace(
            cell, sums=_oriented([cell.value], table.kind, table.higher_is_better), weights=np.ones(1), groups=None
        )
        for key, cell in at.items()
    }
    return replace(table, cells=bare)


def _at(cell: Cell, checkpoint: Checkpoint, higher_is_better: bool) -> Cell:
    if not cell.points or (cell.kept_step is None) == (checkpoint == "last"):
        return cell
    if checkpoint == "last":
        return replace(cell, value=cell.points[-1].value, kept_step=None, train_value=None, others={})
    best, sign = best_point(cell.points, higher_is_better), -1.0 if higher_is_better else 1.0
    if sign * best.value >= sign * cell.value:
        return cell
    earlier = tuple(point for point in cell.points if point.step <= best.step)
    return replace(cell, value=best.value, points=earlier, train_value=None, deviation=None, others={})


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


def contender_of(table: ScoreTable, rank: int) -> Contender:
    columns = table.by_learning_rate(rank)

    def is_surely_lower(rate: float, other: float) -> bool:
        """On the seeds that both have. One number a training shows no noise: there the means decide."""
        return bounds_of(estimate_of_pairs(of_shared_seeds(columns[rate], columns[other]))).high < 0

    best = best_learning_rate({lr: losses_by_seed(cells) for lr, cells in columns.items()}, is_surely_lower)
    cells = columns[best]
    return Contender(rank, best, cells, float(np.mean([cell.loss for cell in cells.values()])))


def on_common_seeds(contenders: list[Contender]) -> dict[int, Contender]:
    adjusted = adjusted_means([losses_by_seed(contender.cells) for contender in contenders])
    return {
        contender.rank: replace(contender, seed_shift=mean - contender.loss)
        for contender, mean in zip(contenders, adjusted, strict=True)
    }


def adjusted_means(losses: Sequence[Mapping[int, float]]) -> list[float]:
    """The mean of each row (seed → loss), as if all rows had all seeds.

    Rows are compared on the seeds that they share: the least-squares fit of loss = row + seed, with seed effects that sum
    to 0. Rows without a seed in common keep their plain means.
    """
    seeds = sorted({seed for row in losses for seed in row})
    if all(len(row) == len(seeds) for row in losses):
        return [float(np.mean(list(row.values()))) for row in losses]
    cells = [(place, seeds.index(seed), loss) for place, row in enumerate(losses) for seed, loss in row.items()]
    level = float(np.mean([loss for _, _, loss in cells]))
    design = np.zeros((len(cells) + len(seeds), len(losses) + len(seeds)))
    target = np.zeros(len(design))
    for number, (place, seed, loss) in enumerate(cells):
        design[number, place] = design[number, len(losses) + seed] = 1.0
        target[number] = loss - level
    design[len(cells) :, len(losses) :] = RIDGE * np.eye(len(seeds))
    solution = np.linalg.lstsq(design, target, rcond=None)[0]
    return [float(row) + level for row in solution[: len(losses)]]


def best_learning_rate(
    losses: Mapping[float, Mapping[int, float]], is_surely_lower: Callable[[float, float], bool]
) -> float:
    """The learning rate with the lowest mean (losses by seed), compared on shared seeds; the lower one on ties.

    Those with the most seeds are compared first. One with fewer seeds replaces the best of them only where
    `is_surely_lower(one, best)` on the seeds that both have, so that a lucky seed does not.
    """
    most = max(len(by_seed) for by_seed in losses.values())
    leaders = [lr for lr in sorted(losses) if len(losses[lr]) == most]
    means = dict(zip(leaders, adjusted_means([losses[lr] for lr in leaders]), strict=True))
    best = min(leaders, key=lambda lr: (means[lr], lr))
    for lr in sorted(losses.keys() - means.keys(), key=lambda lr: (-len(losses[lr]), lr)):
        if losses[lr].keys() & losses[best].keys() and is_surely_lower(lr, best):
            best = lr
    return best


Pair: TypeAlias = tuple[Cell, Cell]
OfSeed = TypeVar("OfSeed")


def estimate_of_pairs(pairs: list[Pair], shift: float = 0.0) -> Estimate:
    """How much worse the first of each pair is than the second."""
    span = max(cell.span for pair in pairs for cell in pair)
    paired = estimate(differences(pairs), pairs[0][0].weights, span, pairs[0][0].groups)
    return replace(paired, mean=paired.mean + shift)


def differences(pairs: list[Pair]) -> Floats:
    """[pairs, examples] how much worse the first of each pair is on each example, times the example's weight."""
    worse: Floats = np.stack([first.sums for first, _ in pairs]) - np.stack([second.sums for _, second in pairs])
    return worse


def paired_cells(contender: Contender, against: Contender) -> list[Pair]:
    """Cells by shared seed; in order where no seed is shared. The single evaluation of the base pairs with every seed."""
    left, right = contender.cells, against.cells
    if contender.rank == 0 and len(left) == 1:
        return [(next(iter(left.values())), cell) for cell in right.values()]
    if against.rank == 0 and len(right) == 1:
        return [(cell, next(iter(right.values()))) for cell in left.values()]
    return of_shared_seeds(left, right) or list(zip(left.values(), right.values(), strict=False))


def of_shared_seeds(left: Mapping[int, OfSeed], right: Mapping[int, OfSeed]) -> list[tuple[OfSeed, OfSeed]]:
    """What both have, by seed."""
    return [(left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())]


def minus(cell: Cell, other: Cell) -> Cell:
    """How much worse one cell is than the other, on each example."""
    span, sums = max(cell.span, other.span), cell.sums - other.sums
    return Cell(cell.trial_id, cell.value - other.value, sums, cell.weights, span, groups=cell.groups)


def spread_of(worse: Cell, margin: float, in_unit: Callable[[float], float] = float) -> DifferenceSpread:
    """How a difference (`minus`) spreads over the examples; `in_unit` turns it into the metric's unit."""
    each = np.sort([in_unit(worse_by) for worse_by in (worse.sums / worse.weights).tolist()])
    amount = SPREAD_MARGINS * margin
    share = float(np.mean(each > amount * (1 + TIE)))
    return DifferenceSpread(amount=amount, worse=share, worst_tenth=float(each[-math.ceil(len(each) / 10) :].mean()))


def spread_sentence(spread: DifferenceSpread) -> str:
    """Say how many examples get much worse; the tenth that gets worst only where some do."""
    if spread.worse == 0:
        return f"No held-out example gets worse by more than {spread.amount:.2g}."
    rounded = f"{spread.worse:.1%}"
    share = "Fewer than 0.1%" if rounded == "0.0%" else rounded.replace(".0%", "%")
    return (
        f"{share} of the examples get worse by more than {spread.amount:.2g}, and the worst tenth by "
        f"{spread.worst_tenth:.2g} on average."
    )


def best_point(points: Sequence[EvalPoint], higher_is_better: bool) -> EvalPoint:
    """The look with the best value; the earliest of equal ones."""
    sign = -1.0 if higher_is_better else 1.0
    return min(points, key=lambda point: (sign * point.value, point.step))


def collapse_of(points: Sequence[EvalPoint], drop: float, higher_is_better: bool = True) -> dict[str, Any] | None:
    """The collapse that the looks of a training show at their end, as fields of `TrialCollapsed`; None if there is none.

    The last value is worse than the best one by more than `drop` and, where both looks have scores of the same examples, by
    more than `SURE_DEVIATIONS` standard errors of their paired difference.
    """
    if len(points) < 2:
        return None
    ordered = sorted(points, key=lambda point: point.step)
    best, last = best_point(ordered, higher_is_better), ordered[-1]
    fall = (best.value - last.value) * (1.0 if higher_is_better else -1.0)
    left, right = best.item_scores or [], last.item_scores or []
    noise = 0.0  # the standard error of the mean paired difference
    if len(left) == len(right) >= 2:
        noise = float(np.std(np.subtract(left, right), ddof=1) / np.sqrt(len(left)))
    if fall <= max(drop, SURE_DEVIATIONS * noise):
        return None
    told = f"the held-out value fell from {best.value:.4g} at step {best.step} to {last.value:.4g} at step {last.step}"
    at = {"step": last.step, "value": last.value, "best_step": best.step, "best_value": best.value}
    return {**at, "reason": told}


def collapsing_cells(outcomes: Collection[TrialOutcome]) -> set[tuple[int, float]]:
    """The (rank, learning rate) at which a training collapsed, where another learning rate of the rank has none and a result.

    A learning rate that some seeds do not survive is no learning rate to recommend, however well the others did.
    """
    if not any(isinstance(outcome, TrialCollapsed) for outcome in outcomes):
        return set()
    outcomes = [outcome for outcome in outcomes if outcome.rank > 0 and outcome.is_direct]
    collapsed = {(trial.rank, trial.learning_rate) for trial in outcomes if isinstance(trial, TrialCollapsed)}
    stable = {(trial.rank, trial.learning_rate) for trial in outcomes if isinstance(trial, TrialFinished)} - collapsed
    return {cell for cell in collapsed if any(rank == cell[0] for rank, _ in stable)}


def without_collapsing(outcomes: Sequence[TrialOutcome]) -> list[TrialOutcome]:
    """The outcomes without the results at learning rates of `collapsing_cells`. Collapsed trials stay: they are missing values."""
    if not (cells := collapsing_cells(outcomes)):
        return list(outcomes)
    return [
        trial
        for trial in outcomes
        if not (isinstance(trial, TrialFinished) and trial.is_direct and (trial.rank, trial.learning_rate) in cells)
    ]
