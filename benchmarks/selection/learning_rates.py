"""How good is the learning rate that looks at an eighth choose, and what do they cost? Grids with means and annealed copies.

    python -m benchmarks.selection.learning_rates            # writes learning_rates.json; nothing is trained

The search for the learning rate of the top rank is replayed on every grid and seed of `planted_new_grids.json`, whose teachers
chose nothing. The regret is the final loss of the chosen learning rate minus that of the best one with the same seed; the
cost is what is trained beside the winner, in whole trainings. Intervals resample whole teachers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from benchmarks.selection.tables import REPLAY_STEPS, GridCurve, TableRunner, read_grids, space_of_grid
from rightrank.schema.trials import TrialFinished, TrialOutcome, steps_of
from rightrank.search import STRATEGIES

HERE = Path(__file__).parent
NEAR = (0.001, 0.005)  # nats a token
RESAMPLES = 2000


@dataclass(frozen=True)
class Searched:
    """One search."""

    name: str
    seed: int
    few: bool  # few sequences over many epochs
    regret: float
    cost: float


def search(curve: GridCurve, seed: int) -> Searched:
    """Replay the search at the top rank with one seed, and nothing after it."""
    cells = {
        rank: {lr: {seed: by_seed[seed]} for lr, by_seed in by_lr.items() if seed in by_seed}
        for rank, by_lr in curve.cells.items()
    }
    alone = replace(curve, cells=cells, truncated={})
    strategy = STRATEGIES["bracket"](space_of_grid(alone, margin=0.005, goal="adapter"))
    runner, outcomes, steps = TableRunner(alone), list[TrialOutcome](), 0
    finished: dict[str, TrialFinished] = {}
    while arms := strategy.ask(outcomes):
        for arm in arms:
            outcome = runner.run(arm)
            if isinstance(outcome, TrialFinished):
                steps += steps_of(arm, finished)
                finished[outcome.trial_id] = outcome
            outcomes.append(outcome)
    top = max(curve.ranks)
    chosen = min(o.value for o in outcomes if isinstance(o, TrialFinished) and o.rank == top and o.arm.is_direct)
    best = min(by_seed[seed] for by_seed in cells[top].values())
    return Searched(curve.name, seed, curve.name.endswith("few"), chosen - best, steps / REPLAY_STEPS - 1.0)


def share(found: Sequence[Searched], near: float) -> dict[str, Any]:
    """How many regrets are at most `near`, with a 95% interval of their share."""
    by_teacher: dict[str, list[bool]] = {}
    for one in found:
        by_teacher.setdefault(one.name, []).append(one.regret <= near)
    values = np.array([np.mean(held) for held in by_teacher.values()])
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), (0.025, 0.975))
    held = sum(sum(one) for one in by_teacher.values())
    return {"searches": held, "low": round(float(low), 3), "high": round(float(high), 3)}


def summary(found: Sequence[Searched]) -> dict[str, Any]:
    return {
        "searches": len(found),
        "teachers": len({one.name for one in found}),
        **{f"within {near:g}": share(found, near) for near in NEAR},
        "largest_regret": round(max(one.regret for one in found), 6),
        "mean_cost": round(float(np.mean([one.cost for one in found])), 3),
        "largest_cost": round(max(one.cost for one in found), 3),
    }


def judge() -> dict[str, Any]:
    found = [search(curve, seed) for curve in read_grids(HERE / "planted_new_grids.json") for seed in curve.seeds]
    return {
        "machine": machine(),
        "fresh examples": summary([one for one in found if not one.few]),
        "few examples": summary([one for one in found if one.few]),
        "above .001": [
            {"grid": one.name, "seed": one.seed, "regret": round(one.regret, 6)}
            for one in found
            if one.regret > NEAR[0]
        ],
    }


def main() -> None:
    result = judge()
    (HERE / "learning_rates.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "above .001"}, indent=1))


if __name__ == "__main__":
    main()
