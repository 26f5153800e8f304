"""Replay a strategy on grids of finished runs and count how often it picks the same rank as the full grid.

    python -m benchmarks.selection.replay --grids FILE --strategy S --margin M [--json]

Truth is the full grid's pick at that margin: the smallest rank within the margin of the best over all learning rates, averaged
over seeds. Regret is computed for the exported cell (its rank and its learning rate). An under-pick is a rank below the
truth that even at its best learning rate is worse than the best by more than the margin. The share of cells is the cost in
full trainings divided by the rank × learning rate cells of one seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.selection.tables import GridCurve, Replayed, build_space, read_grids, replay
from rightrank.schema.errors import InputError, ResultsError, SettingsError
from rightrank.schema.settings import Goal
from rightrank.search.protocol import Space, Strategy
from rightrank.search.strategies import make_strategy


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
    false_pass: bool = False  # whether the exported adapter is worse than the reference by more than the margin


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
        false_pass=regret > 1e-9,
    )


def judge_adapter(curve: GridCurve, margin: float, replayed: Replayed) -> Judged:
    """Compare the adapter handed over with all adapters of the same seed: trained and truncated.

    Truth is the smallest rank at which any of them is within the margin of the best. Values are those of the test split
    where the grid has them, which chose nothing.
    """
    assert replayed.adapter is not None
    seed, sign = curve.seeds[0], -1 if curve.higher_is_better else 1
    grids = curve.tests or {"trained": curve.cells, "truncated": curve.truncated}
    values = {
        (kind, rank, learning_rate): sign * by_seed[seed]
        for kind, grid in grids.items()
        for rank, by_learning_rate in grid.items()
        for learning_rate, by_seed in by_learning_rate.items()
        if seed in by_seed
    }
    best = min(values.values())
    truth = min(rank for (_, rank, _), loss in values.items() if loss <= best + margin + 1e-9)
    pick = replayed.adapter.rank
    ranks = sorted({rank for _, rank, _ in values})
    value = values.get((replayed.adapter.method, pick, replayed.parent_learning_rate))
    reference = values.get(("trained", replayed.adapter.trained_rank, replayed.parent_learning_rate))
    regret = 0.0 if value is None else max(0.0, value - best - margin)
    worse = 0.0 if value is None or reference is None else value - reference
    return Judged(
        name=curve.name,
        family=curve.family,
        truth=truth,
        pick=pick,
        learning_rate=replayed.parent_learning_rate,
        exact=pick == truth,
        neighbour=abs(ranks.index(pick) - ranks.index(truth)) <= 1,
        under=pick < truth,
        over=pick > truth,
        regret=regret if regret > 1e-9 else 0.0,
        trainings=replayed.trainings,
        share=replayed.trainings / curve.size,
        false_pass=worse > margin + 1e-9,
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
        "false_passes": sum(pick.false_pass for pick in judged),
        "mean_trainings": round(sum(pick.trainings for pick in judged) / count, 3),
    }


def replay_all(
    curves: Sequence[GridCurve],
    make: Callable[[Space], Strategy],
    margin: float,
    seeds: int = 1,
    goal: Goal = "training-rank",
) -> list[Judged]:
    """Replay a strategy on every grid. With goal "adapter", grids without truncations are left out: they only answer the training rank."""
    judged = []
    for curve in curves:
        if goal == "adapter" and not curve.truncated:
            continue
        replayed: Replayed = replay(curve, make, build_space(curve, margin, seeds, goal=goal))
        if goal == "adapter" and replayed.adapter is not None:
            judged.append(judge_adapter(curve, margin, replayed))
        else:
            judged.append(judge(curve, margin, replayed.answer.rank, replayed.answer.learning_rate, replayed.trainings))
    return judged


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection.replay", description=__doc__.split("\n")[0])
    parser.add_argument("--grids", type=Path, required=True, metavar="FILE")
    parser.add_argument("--strategy", required=True, metavar="S")
    parser.add_argument("--margin", type=float, required=True, metavar="M", help="in the metric's unit")
    parser.add_argument("--seeds", type=int, default=1, help="seeds that the strategy may use (default 1)")
    parser.add_argument("--goal", choices=["adapter", "training-rank"], default="training-rank", help="which question")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(arguments)
    try:
        if not options.margin > 0 or options.seeds < 1:
            raise SettingsError(f"margin {options.margin:g}, seeds {options.seeds} are not valid; give numbers above 0")
        judged = replay_all(
            read_grids(options.grids),
            partial(make_strategy, options.strategy),
            options.margin,
            options.seeds,
            options.goal,
        )
        if not judged:
            raise ResultsError(f"{options.grids} has no grid with truncations; give --goal training-rank")
    except InputError as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(summarize(judged)))
        return 0
    for pick in judged:
        note = "exact" if pick.exact else "under" if pick.under else "over" if pick.over else "-"
        print(f"{pick.name:44} truth {pick.truth:>4} pick {pick.pick!s:>5} {note:6} {pick.trainings:5.1f} trainings")
    for name, value in summarize(judged).items():
        print(f"{name:20} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
