"""Replay a strategy on grids of finished runs and count how often it picks the same rank as the full grid.

Truth is the full grid's pick at that margin: the smallest rank within the margin of the best over all learning rates, averaged
over seeds. Regret is computed for the exported cell (its rank and its learning rate). An under-pick is a rank below the
truth that even at its best learning rate is worse than the best by more than the margin. The share of cells is the cost in
full trainings divided by the rank × learning rate cells of one seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.selection.tables import GridCurve, build_space, replay
from rightrank.search.protocol import Space, Strategy


@dataclass(frozen=True)
class Judged:
    """One pick compared with the truth of its grid."""

    name: str
    family: str
    truth: int
    pick: int | None
    learning_rate: float | None
    exact: bool
    neighbour: bool  # exact, or the next rank above or below in the grid
    under: bool
    over: bool
    regret: float  # max(0, loss of the picked cell - best - margin)
    trainings: float
    share: float


def judge(curve: GridCurve, margin: float, pick: int | None, learning_rate: float | None, trainings: float) -> Judged:
    """Compare a pick with the full grid."""
    truth, ranks = curve.truth(margin), curve.ranks
    best = min(curve.best(rank) for rank in ranks)
    regret, distance = 0.0, 0
    if pick is not None:
        loss = curve.loss(pick, learning_rate) if learning_rate in curve.cells[pick] else curve.best(pick)
        regret = max(0.0, loss - best - margin)
        distance = ranks.index(pick) - ranks.index(truth)
    return Judged(
        name=curve.name,
        family=curve.family,
        truth=truth,
        pick=pick,
        learning_rate=learning_rate,
        exact=pick == truth,
        neighbour=pick is not None and abs(distance) <= 1,
        under=pick is not None and pick < truth and curve.best(pick) - best > margin + 1e-9,
        over=pick is not None and pick > truth,
        regret=regret if regret > 1e-9 else 0.0,
        trainings=trainings,
        share=trainings / curve.size,
    )


def summarize(judged: Sequence[Judged]) -> dict[str, float | int]:
    """Return the counts of the contract."""
    count = len(judged)
    return {
        "curves": count,
        "exact": sum(pick.exact for pick in judged),
        "exact_or_neighbour": sum(pick.neighbour for pick in judged),
        "under_picks": sum(pick.under for pick in judged),
        "over_picks": sum(pick.over for pick in judged),
        "mean_excess_regret": round(sum(pick.regret for pick in judged) / count, 6),
        "share_of_cells": round(sum(pick.share for pick in judged) / count, 4),
        "abstentions": sum(pick.pick is None for pick in judged),
        "mean_trainings": round(sum(pick.trainings for pick in judged) / count, 3),
    }


def replay_all(
    curves: Sequence[GridCurve], make: Callable[[Space], Strategy], margin: float, seeds: int = 1
) -> list[Judged]:
    """Replay a strategy on every grid."""
    judged = []
    for curve in curves:
        replayed = replay(curve, make, build_space(curve, margin, seeds))
        judged.append(judge(curve, margin, replayed.answer.rank, replayed.answer.learning_rate, replayed.trainings))
    return judged
