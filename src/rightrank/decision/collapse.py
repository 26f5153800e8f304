"""Trainings that fell far below their own best: no evidence, and nothing of them is handed over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rightrank.schema.trials import EvalPoint, TrialCollapsed, TrialFinished, TrialOutcome

DROP_IN_MARGINS = 2.5  # the fall that counts as a collapse: five points at a margin of two
MIN_LOOKS_TO_END = 3  # the best one, and two far below it
SURE_DEVIATIONS = 3.0  # of the paired fall over examples: the best of several looks is optimistic by about two


@dataclass(frozen=True, slots=True)
class Collapse:
    """Where a training was best, and where it ended."""

    best: EvalPoint
    last: EvalPoint

    @property
    def reason(self) -> str:
        return (
            f"the held-out value fell from {self.best.value:.4g} at step {self.best.step} to {self.last.value:.4g} "
            f"at step {self.last.step}"
        )


def best_point(points: Sequence[EvalPoint], higher_is_better: bool) -> EvalPoint:
    """The look with the best value; the earliest of equal ones."""
    sign = -1.0 if higher_is_better else 1.0
    return min(points, key=lambda point: (sign * point.value, point.step))


def collapse_of(points: Sequence[EvalPoint], drop: float, higher_is_better: bool = True) -> Collapse | None:
    """The collapse that the looks of a training show at their end; None if there is none.

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
    return Collapse(best, last) if fall > max(drop, SURE_DEVIATIONS * noise) else None


def should_stop_early(points: Sequence[EvalPoint], drop: float, higher_is_better: bool = True) -> bool:
    """Whether a training has collapsed so far that further steps are not worth their cost.

    Its last two looks are both far below the best, and below the middle between the first look and the best. Runs recover from
    lesser falls: a published one from .83 by way of .51 and .47 to .82 (benchmarks/rl).
    """
    ordered = sorted(points, key=lambda point: point.step)
    if len(ordered) < MIN_LOOKS_TO_END:
        return False
    middle = (ordered[0].value + best_point(ordered, higher_is_better).value) / 2
    below = [(middle - point.value) * (1.0 if higher_is_better else -1.0) > 0 for point in ordered[-2:]]
    both = (ordered, ordered[:-1])
    return all(below) and all(collapse_of(found, drop, higher_is_better) is not None for found in both)


def collapsing_cells(outcomes: Iterable[TrialOutcome]) -> set[tuple[int, float]]:
    """The (rank, learning rate) at which a training collapsed, where another learning rate of the rank has none and a result.

    A learning rate that some seeds do not survive is no learning rate to recommend, however well the others did.
    """
    outcomes = [outcome for outcome in outcomes if outcome.rank > 0 and outcome.is_direct]
    collapsed = {(one.rank, one.learning_rate) for one in outcomes if isinstance(one, TrialCollapsed)}
    stable = {(one.rank, one.learning_rate) for one in outcomes if isinstance(one, TrialFinished)} - collapsed
    return {cell for cell in collapsed if any(rank == cell[0] for rank, _ in stable)}


def without_collapsing(outcomes: Sequence[TrialOutcome]) -> list[TrialOutcome]:
    """The outcomes without the results at learning rates of `collapsing_cells`. Collapsed trials stay: they are missing values."""
    cells = collapsing_cells(outcomes)
    return [
        one
        for one in outcomes
        if not (isinstance(one, TrialFinished) and one.is_direct and (one.rank, one.learning_rate) in cells)
    ]
