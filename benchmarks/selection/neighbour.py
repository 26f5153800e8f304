"""Does the learning rate below the winner deserve a second look at a quarter of the training? A replay of stored grids.

    python -m benchmarks.selection.neighbour FILE... [--out neighbour.json]

The search picks the winner by looks at an eighth. Here the next lower learning rate is trained on to a quarter too (.125 of a
training), where the winner is anyway, and the lower loss there goes on. It is tried always, and only where the two were close at an eighth (`CLOSE` of
what was learned). Of every seed in turn: trainings, regret beyond the margin, exact and too small answers, and how often the rate changed. One old
grid suggested it, so only grids that it has not seen can judge it; nothing is adopted here. A grid needs values at .125 and .25 (`checkpoints`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.machine import machine
from benchmarks.selection.compare import judge
from benchmarks.selection.tables import GridCurve, each_seed_first, read_grids, replay, space_of_grid
from rightrank.search import bracket, learning_rates
from rightrank.search.history import Requests, Trials, base_arm
from rightrank.search.learning_rates import LOOK, QUARTER

MARGINS = (0.005, 0.02, 0.05)
PARTS = (LOOK, QUARTER)
Finish = Callable[[Trials, int, float, float], Requests]
ORIGINAL: Finish = learning_rates._finish


def with_neighbour(close: float, changed: list[bool]) -> Finish:
    """The search's last part, after the lower neighbour was compared at a quarter where it was within `close` at an eighth."""

    def finish(trials: Trials, rank: int, winner: float, part: float) -> Requests:
        space = trials.space
        looks = {lr: learning_rates._early_arm(space, rank, lr, LOOK) for lr in space.learning_rates}
        lower = max((lr for lr in looks if lr < winner and trials.finished(looks[lr])), default=None)
        if part == LOOK and lower is not None and trials.whole(rank, winner) is None:
            ours, theirs, base = (
                learning_rates._look_loss(trials, arm)
                for arm in (looks[winner], looks[lower], base_arm(space.lora_alpha))
            )
            if ours is not None and theirs is not None and base is not None and theirs - ours <= close * (base - ours):
                step = learning_rates._early_step(space, QUARTER)
                arms = {}
                for lr in (winner, lower):
                    arms[lr] = yield from learning_rates._bring_to(trials, rank, lr, step)
                losses = {
                    lr: loss for lr, arm in arms.items() if (loss := learning_rates._look_loss(trials, arm)) is not None
                }
                best = min(losses, key=lambda lr: (losses[lr], lr), default=winner)
                changed.append(best != winner)
                winner = best
        yield from ORIGINAL(trials, rank, winner, part)

    return finish


WAYS: dict[str, float | None] = {"as it is": None, "close": learning_rates.CLOSE, "always": float("inf")}


def judged(curves: Sequence[GridCurve], way: str) -> dict[str, Any]:
    """Means over every seed first and every margin."""
    changed: list[bool] = []
    limit = WAYS[way]
    finish = ORIGINAL if limit is None else with_neighbour(limit, changed)
    rows = []
    with patch.object(learning_rates, "_finish", finish):
        for curve, margin in product(curves, MARGINS):
            done = replay(curve, bracket.Bracket, space_of_grid(curve, margin))
            rows.append(judge(curve, margin, done.answer.rank, done.answer.learning_rate, done.trainings))
    return {
        "cases": len(rows),
        "trainings": round(float(np.mean([row.trainings for row in rows])), 3),
        "regret": round(float(np.mean([row.regret for row in rows])), 5),
        "exact": round(float(np.mean([row.exact for row in rows])), 3),
        "too small": round(float(np.mean([row.under for row in rows])), 3),
        "compared": len(changed),
        "changed": sum(changed),
    }


def curves_in(files: Sequence[Path]) -> Iterator[GridCurve]:
    for file in files:
        for curve in read_grids(file):
            if all(part in curve.checkpoints for part in PARTS):
                yield from each_seed_first(curve)
            else:
                print(f"{curve.name}: no values at {' and '.join(map(str, PARTS))}, left out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    curves = list(curves_in(asked.files))
    found = {way: judged(curves, way) for way in WAYS} if curves else {}
    print(json.dumps(found, indent=1))
    if asked.out is not None:
        grids = sorted({curve.name.partition(",")[0] for curve in curves})
        asked.out.write_text(json.dumps({"machine": machine(), "grids": grids, "ways": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
