"""Finished trials as a table of rank × learning rate × seed. A cell has the scores of its examples, or one number.

Trainings that fell far below their own best are missing values: they are no evidence, and their adapters are not handed over.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from operator import itemgetter
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from rightrank.decision.comparison import (
    INDEPENDENCE_NOTE,
    Estimate,
    compute_bounds,
    compute_score_range,
    estimate_mean,
)
from rightrank.schema.metrics import Checkpoint, LossKind, MetricKind, infer_metric_kind
from rightrank.schema.trials import (
    EvalPoint,
    Floats,
    Groups,
    MetricName,
    TrialFailed,
    TrialFinished,
    TrialOutcome,
)

RELIABLE_GROUPS = 16  # with fewer groups, their number is part of the uncertainty
MAX_EXPONENT = 100.0  # keeps the bound of a perplexity finite
RIDGE = 1e-4  # keeps seed effects at 0 if the shared seeds do not determine them
# On 267 stored grids with 10,910 trainings, 69 are outliers. Three of them are on grids of real models and texts.
FAR_DEVIATIONS, FAR_SHARE = 20.0, 0.1


@dataclass(frozen=True)
class Cell:
    """One finished trial. Scores are oriented so that lower is better; a perplexity is its logarithm."""

    trial_id: str
    value: float  # as measured, in the metric's own direction
    sums: Floats  # [examples] oriented score of each example times its weight; [1] the score without examples
    weights: Floats  # [examples] tokens of each example, or ones
    score_range: float = 0.0  # the range of one example's score; 0 for losses, which have no bound
    train_value: float | None = None
    deviation: float | None = None  # the stated standard deviation over seeds, oriented unit
    deviation_seeds: int = 1  # the number of seeds that the stated value averages
    steps: int | None = None
    checkpoint_step: int | None = None  # the step of the value, if it is not that of the last evaluation
    points: tuple[EvalPoint, ...] = ()  # during training, in the metric's own direction
    groups: Groups | None = None  # [examples] the group of each example; None: no groups

    @property
    def examples(self) -> int:
        """Return the number of examples; 0 if there is only one number for the trial."""
        return len(self.sums) if len(self.sums) > 1 else 0

    @property
    def num_groups(self) -> int:
        """Return the number of independent examples, or of groups if there are any."""
        return self.examples if self.groups is None else int(self.groups.max()) + 1

    @property
    def assumption(self) -> str:
        """Return the assumption of bounds over examples; empty without examples."""
        if self.groups is None:
            return INDEPENDENCE_NOTE if self.examples else ""
        over = f"Bounds are over {self.num_groups:,} groups of {self.examples:,} examples"
        few = f", which are rough: give {RELIABLE_GROUPS} groups or more" if self.num_groups < RELIABLE_GROUPS else ""
        return f"{over}{few}."

    @cached_property
    def loss(self) -> float:
        """Return the oriented mean: lower is better."""
        return float(self.sums.sum() / self.weights.sum())


@dataclass(frozen=True)
class ScoreTable:
    """Cells by (rank, learning rate, seed). `missing` counts the trials of a rank without a result.

    `tried` holds the learning rates of trainings that stopped early or diverged. They have no cells but bound the best one.
    """

    metric: str
    higher_is_better: bool
    cells: Mapping[tuple[int, float, int], Cell]
    missing: Mapping[int, int] = field(default_factory=dict)
    kind: MetricKind = "token_loss"
    tried_rates: Mapping[int, Collection[float]] = field(default_factory=dict)

    @cached_property
    def _by_rank(self) -> Mapping[int, Mapping[float, Mapping[int, Cell]]]:
        by_rank: dict[int, dict[float, dict[int, Cell]]] = {}
        for (rank, learning_rate, seed), cell in sorted(self.cells.items(), key=itemgetter(0)):
            by_rank.setdefault(rank, {}).setdefault(learning_rate, {})[seed] = cell
        return by_rank

    def list_ranks(self) -> list[int]:
        """List the ranks with a finished trial, ascending, without the base model."""
        return [rank for rank in self._by_rank if rank > 0]

    def list_tried_rates(self, rank: int) -> list[float]:
        """List the rank's learning rates, including those that stopped early or diverged."""
        return sorted({*self.get_cells_by_rate(rank), *self.tried_rates.get(rank, ())})

    def list_edge_rates(self, learning_rate: float, rank: int) -> list[float]:
        """Return the tried learning rates if this best one of the rank is the lowest or the highest of them; else an empty list.

        They are those of the rank, or else those of every rank at which several were tried: most ranks of a search get one
        learning rate, the best of another rank.
        """
        ranks = sorted({*self._by_rank, *self.tried_rates})
        tried_rates = {rank: self.list_tried_rates(rank) for rank in ranks}
        all_rates = sorted({rate for rates in tried_rates.values() if len(rates) > 1 for rate in rates})
        return next((r for r in (tried_rates[rank], all_rates) if len(r) > 1 and learning_rate in (r[0], r[-1])), [])

    def get_cells_by_rate(self, rank: int) -> Mapping[float, Mapping[int, Cell]]:
        """Return the rank's cells by learning rate and seed, both ascending."""
        return self._by_rank.get(rank, {})


@dataclass(frozen=True, slots=True)
class Outlier:
    """A training that ended far from every other seed of its rank and learning rate."""

    rank: int
    learning_rate: float
    seed: int
    value: float  # as measured, in the metric's own direction
    other_values: tuple[float, ...]  # of the other seeds


def find_outliers(table: ScoreTable) -> list[Outlier]:
    """Find the trainings that ended far from every other seed of their rank and learning rate, such as one that diverged.

    Far is more than a share of the typical loss and than `FAR_DEVIATIONS` standard deviations over seeds, the largest of the medians of
    all other columns, of those with this rank, and of the other seeds. Of two seeds, the one farther from the typical loss is the outlier. If half of
    three or more seeds are far, the learning rate is unstable, and none is an outlier.
    """
    columns = {
        (rank, rate): cells
        for rank in table.list_ranks()
        for rate, cells in table.get_cells_by_rate(rank).items()
        if len(cells) > 1
    }
    losses = {key: [cell.loss for cell in cells.values()] for key, cells in columns.items()}
    typical_loss = float(np.median(list(chain.from_iterable(losses.values())))) if losses else 0.0
    outliers: list[Outlier] = []
    for key, cells in columns.items():
        other_losses = {column: values for column, values in losses.items() if column != key}
        same_rank = [values for (rank, _), values in other_losses.items() if rank == key[0]]
        far = []
        for seed, cell in cells.items():
            others = [sibling.loss for number, sibling in cells.items() if number != seed]
            groups = (other_losses.values(), same_rank, [others] if len(others) > 1 else [])
            deviations = [np.median([np.std(values, ddof=1) for values in group]) for group in groups if group]
            limit = max(FAR_SHARE * abs(typical_loss), FAR_DEVIATIONS * max(deviations, default=math.inf))
            if min(abs(cell.loss - loss) for loss in others) > limit:
                far.append(seed)
        if len(cells) == 2:
            far = sorted(far, key=lambda seed: abs(cells[seed].loss - typical_loss))[-1:]
        if len(cells) == 2 or 2 * len(far) < len(cells):
            for seed in far:
                other_values = tuple(cell.value for number, cell in cells.items() if number != seed)
                outliers.append(Outlier(*key, seed, cells[seed].value, other_values))
    return outliers


def build_table(
    outcomes: Iterable[TrialOutcome],
    metric: MetricName,
    higher_is_better: bool,
    points_metric: str | None = None,
    partial_outcomes: Iterable[TrialOutcome] = (),
    loss: LossKind = "token_loss",
) -> ScoreTable:
    """Build the table of a run's outcomes.

    Args:
        outcomes: an outcome without this metric counts as missing.
        points_metric: the metric of evaluations during training; None for `metric`.
        partial_outcomes: trainings that are not compared, such as those stopped early; their learning rates count as tried.
        loss: the kind of a loss.
    """
    outcomes = list(outcomes)
    kind = infer_metric_kind(metric, higher_is_better, loss)
    scored = [o for o in outcomes if isinstance(o, TrialFinished) and metric in o.metrics]
    if kind == "perplexity" and not all(trial.metrics[metric] > 0 for trial in scored):
        kind = "other"  # Perplexities are above 0.
    cells = {
        (trial.rank, trial.learning_rate, trial.seed): build_cell(
            trial.trial_id,
            trial.metrics[metric],
            items,
            kind,
            higher_is_better,
            trial.example_groups,
            train_value=trial.train_value,
            deviation=_convert_deviation(trial, metric, kind),
            deviation_seeds=trial.averaged_seeds,
            steps=trial.steps or None,
            checkpoint_step=trial.checkpoint_step,
            points=tuple(trial.points) if points_metric in (None, metric) else (),
        )
        for trial, items in zip(scored, _collect_example_scores(scored, metric), strict=True)
    }
    missing = Counter(o.rank for o in outcomes if not isinstance(o, TrialFinished) or metric not in o.metrics)
    tried_rates: dict[int, set[float]] = {}
    for outcome in chain(outcomes, partial_outcomes):
        if outcome.rank > 0 and outcome.truncate_from is None and not isinstance(outcome, TrialFailed):
            tried_rates.setdefault(outcome.rank, set()).add(outcome.learning_rate)
    return ScoreTable(metric, higher_is_better, cells, missing, kind, tried_rates)


def build_cell(
    name: str,
    value: float,
    example_scores: tuple[Sequence[float], Sequence[float]] | None,
    kind: MetricKind,
    higher_is_better: bool,
    groups: Sequence[int] | None = None,
    **fields: Any,
) -> Cell:
    """Build a cell from scores in the metric's direction.

    Args:
        value: the mean score.
        example_scores: `(score of each example times its weight, weights)`; None if only the mean is known.
        groups: the group of each example; None: no groups.
        fields: other fields of the cell.
    """
    scores, weights = (np.asarray(each, dtype=np.float64) for each in example_scores or ([value], [1.0]))
    scale = weights if kind == "perplexity" else np.ones(1)  # The logarithm applies to the score without its weight.
    sums = orient_scores(scores / scale, kind, higher_is_better) * scale
    score_range = compute_score_range(kind, scores, weights)
    return Cell(name, value, sums, weights, score_range, groups=number_groups(groups, len(weights)), **fields)


def _collect_example_scores(
    trials: Sequence[TrialFinished], metric: MetricName
) -> list[tuple[Sequence[float], Sequence[float]] | None]:
    """Return `(scores times weights, weights)` by example of each trial, or None for all if their examples cannot be paired.

    A base with one number has this score on each example of the ranks.
    """
    examples = [trial.get_weighted_scores(metric) for trial in trials]
    weights = next((items[1] for trial, items in zip(trials, examples, strict=True) if items and trial.rank), [])
    examples = [
        ([trial.metrics[metric] * weight for weight in weights], weights) if items is None and not trial.rank else items
        for trial, items in zip(trials, examples, strict=True)
    ]
    is_paired = all(items is not None and len(items[1]) == len(weights) for items in examples)
    return examples if weights and is_paired else [None] * len(trials)


def number_groups(numbers: Sequence[int] | None, examples: int) -> Groups | None:
    """Return group numbers without gaps, or None if each example stands for itself."""
    if numbers is None or len(numbers) != examples or len(set(numbers)) in (1, examples):
        return None
    return np.unique(np.asarray(numbers, np.int64), return_inverse=True)[1]


def orient_scores(scores: ArrayLike, kind: MetricKind, higher: bool) -> Floats:
    """Orient scores so that lower is better; perplexities become logarithms."""
    values = np.asarray(scores)
    return np.log(values) if kind == "perplexity" else -values if higher else values


@dataclass(frozen=True, slots=True)
class MetricUnit:
    """Conversion from the oriented unit (lower is better, nats for a perplexity) to the metric's unit."""

    kind: MetricKind
    higher_is_better: bool
    reference: float  # the reference's value in the metric's unit

    def convert_value(self, oriented: float) -> float:
        if self.kind == "perplexity":
            return math.exp(min(oriented, MAX_EXPONENT))
        return -oriented if self.higher_is_better else oriented

    def convert_difference(self, oriented: float) -> float:
        """Convert an oriented difference from the reference to the metric's unit; above 0 is worse."""
        return self.reference * math.expm1(min(oriented, MAX_EXPONENT)) if self.kind == "perplexity" else oriented

    def convert_margin(self, margin: float) -> float:
        return math.log1p(margin / self.reference) if self.kind == "perplexity" else margin


def _convert_deviation(trial: TrialFinished, metric: MetricName, kind: MetricKind) -> float | None:
    """Return the stated deviation in the oriented unit."""
    deviation = trial.seed_deviation
    if deviation is None or kind != "perplexity":
        return deviation
    return math.log1p(deviation / trial.metrics[metric])


def select_checkpoint(table: ScoreTable, checkpoint: Checkpoint) -> ScoreTable:
    """Return the table with each training at its last or at its best evaluation, the earliest of equal ones.

    Example scores belong to the evaluation whose weights were kept. If another one counts, every training counts by its value.
    """
    selected = {
        key: _select_cell_checkpoint(cell, checkpoint, table.higher_is_better) for key, cell in table.cells.items()
    }
    if all(selected[key] is cell for key, cell in table.cells.items()):
        return table
    bare_cells = {
        key: replace(
            cell, sums=orient_scores([cell.value], table.kind, table.higher_is_better), weights=np.ones(1), groups=None
        )
        for key, cell in selected.items()
    }
    return replace(table, cells=bare_cells)


def _select_cell_checkpoint(cell: Cell, checkpoint: Checkpoint, higher_is_better: bool) -> Cell:
    if not cell.points or (cell.checkpoint_step is None) == (checkpoint == "last"):
        return cell
    if checkpoint == "last":
        return replace(cell, value=cell.points[-1].value, checkpoint_step=None, train_value=None)
    best, sign = find_best_point(cell.points, higher_is_better), -1.0 if higher_is_better else 1.0
    if best.step == cell.points[-1].step or sign * best.value >= sign * cell.value:
        return cell
    earlier = tuple(point for point in cell.points if point.step <= best.step)
    return replace(cell, value=best.value, points=earlier, train_value=None, deviation=None)


@dataclass(frozen=True, slots=True)
class Contender:
    """A rank at its best learning rate."""

    rank: int
    learning_rate: float
    cells: Mapping[int, Cell]  # by seed
    loss: float  # oriented mean, lower is better: over its own seeds, or as with the seeds of all ranks (`align_contenders`)


def select_contender(table: ScoreTable, rank: int) -> Contender:
    columns = table.get_cells_by_rate(rank)

    def is_surely_lower(candidate_rate: float, best_rate: float) -> bool:
        """Compare on shared seeds. One number a training shows no noise, so the means decide then."""
        return compute_bounds(estimate_pairs(pair_shared_seeds(columns[candidate_rate], columns[best_rate]))).high < 0

    losses = {rate: {seed: cell.loss for seed, cell in cells.items()} for rate, cells in columns.items()}
    best = select_best_learning_rate(losses, is_surely_lower)
    cells = columns[best]
    return Contender(rank, best, cells, float(np.mean([cell.loss for cell in cells.values()])))


def align_contenders(contenders: Sequence[Contender]) -> dict[int, Contender]:
    """Give each rank the loss that it would have with the seeds of all ranks."""
    losses = [{seed: cell.loss for seed, cell in contender.cells.items()} for contender in contenders]
    adjusted = compute_adjusted_means(losses)
    return {contender.rank: replace(contender, loss=loss) for contender, loss in zip(contenders, adjusted, strict=True)}


def compute_adjusted_means(losses: Sequence[Mapping[int, float]]) -> list[float]:
    """Compute the mean of each row (seed → loss) as if all rows had all seeds.

    Rows are compared on the seeds that they share: the least-squares fit of loss = row + seed, with seed effects that sum
    to 0. Rows without a shared seed keep their plain means.
    """
    seeds = sorted({seed for row in losses for seed in row})
    if all(len(row) == len(seeds) for row in losses):
        return [float(np.mean(list(row.values()))) for row in losses]
    cells = [(row, seeds.index(seed), loss) for row, by_seed in enumerate(losses) for seed, loss in by_seed.items()]
    rows, columns, values = zip(*cells, strict=True)
    level = float(np.mean(values))
    design = np.block([
        [np.eye(len(losses))[list(rows)], np.eye(len(seeds))[list(columns)]],
        [np.zeros((len(seeds), len(losses))), RIDGE * np.eye(len(seeds))],
    ])  # fmt: skip
    target = np.append(np.array(values) - level, np.zeros(len(seeds)))
    solution = np.linalg.lstsq(design, target, rcond=None)[0]
    return [float(row) + level for row in solution[: len(losses)]]


def select_best_learning_rate(
    losses: Mapping[float, Mapping[int, float]], is_surely_lower: Callable[[float, float], bool]
) -> float:
    """Select the learning rate with the lowest loss on shared seeds; the lower one if two are equal.

    Rates with the most seeds are compared first. One with fewer seeds replaces the best of them only if
    `is_surely_lower(rate, best)` on the seeds that both have, so that a lucky seed does not.
    """
    max_seeds = max(len(by_seed) for by_seed in losses.values())
    leaders = [lr for lr in sorted(losses) if len(losses[lr]) == max_seeds]
    means = dict(zip(leaders, compute_adjusted_means([losses[lr] for lr in leaders]), strict=True))
    best = min(leaders, key=lambda lr: (means[lr], lr))
    for lr in sorted(losses.keys() - means.keys(), key=lambda lr: (-len(losses[lr]), lr)):
        if losses[lr].keys() & losses[best].keys() and is_surely_lower(lr, best):
            best = lr
    return best


Pair: TypeAlias = tuple[Cell, Cell]
SeedValue = TypeVar("SeedValue")


def estimate_pairs(pairs: list[Pair]) -> Estimate:
    """Estimate how much worse the first of each pair is than the second."""
    score_range = max(cell.score_range for pair in pairs for cell in pair)
    return estimate_mean(compute_differences(pairs), pairs[0][0].weights, score_range, pairs[0][0].groups)


def compute_differences(pairs: list[Pair]) -> Floats:
    """Return [pairs, examples] how much worse the first of each pair is on each example, times the example's weight."""
    differences: Floats = np.stack([first.sums for first, _ in pairs]) - np.stack([second.sums for _, second in pairs])
    return differences


def pair_cells(contender: Contender, opponent: Contender) -> list[Pair]:
    """Pair cells by shared seed, or in order if no seed is shared. The single evaluation of the base model pairs with every seed."""
    first_cells, second_cells = contender.cells, opponent.cells
    if contender.rank == 0 and len(first_cells) == 1:
        return [(next(iter(first_cells.values())), cell) for cell in second_cells.values()]
    if opponent.rank == 0 and len(second_cells) == 1:
        return [(cell, next(iter(second_cells.values()))) for cell in first_cells.values()]
    return pair_shared_seeds(first_cells, second_cells) or list(
        zip(first_cells.values(), second_cells.values(), strict=False)
    )


def pair_shared_seeds(
    first: Mapping[int, SeedValue], second: Mapping[int, SeedValue]
) -> list[tuple[SeedValue, SeedValue]]:
    """Return the pairs of values of the shared seeds."""
    return [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]


def compute_paired_difference(cell: Cell, reference: Cell) -> Cell:
    """Compute how much worse one cell is than the other, on each example."""
    score_range, sums = max(cell.score_range, reference.score_range), cell.sums - reference.sums
    return Cell(cell.trial_id, cell.value - reference.value, sums, cell.weights, score_range, groups=cell.groups)


def find_best_point(points: Sequence[EvalPoint], higher_is_better: bool) -> EvalPoint:
    """Find the evaluation with the best value; the earliest of equal ones."""
    sign = -1.0 if higher_is_better else 1.0
    return min(points, key=lambda point: (sign * point.value, point.step))
