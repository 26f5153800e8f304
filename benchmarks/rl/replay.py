"""Replays of the profile `rl` on trainings that have finished: the live case, and the public grid.

    python -m benchmarks.rl.replay                          # the live case
    python -m benchmarks.rl.replay wandb_rl_export.db       # and the public grid, by its owner's file

The public grid is `results/wandb_rl_export.db` of github.com/kenkuuu/lora-without-regret (GRPO on Qwen3-1.7B, 50 steps, 11 looks,
one seed). The repository states no licence, so the file and its rows are not part of this one: `replay.json` has what the replays
found, no data of theirs.

A replay draws the order of the seeds and a subset of the learning rates, asks the strategy, and answers from the stored runs. A
baseline that hands over the end of the run with the best value at a fifth of the steps stands beside it.
"""

from __future__ import annotations

import json
import random
import sqlite3
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

from tests.tiny import UNMEASURED

from rightrank.decision.rule import decision_of
from rightrank.decision.table import DROP_IN_MARGINS, best_point, collapse_of, table_of, without_collapsing
from rightrank.schema.decision import Decision
from rightrank.schema.errors import ResultsError
from rightrank.schema.settings import PROFILES
from rightrank.schema.trials import Arm, EvalPoint, TrialCollapsed, TrialFinished, TrialOutcome, trial_id
from rightrank.search.history import Space
from rightrank.search.upward import Upward

HERE = Path(__file__).parent
LIVE, RESULTS = HERE / "live.json", HERE / "replay.json"
MARGIN = PROFILES["rl"]["margin"]
EARLY = 0.2  # of the steps, where the baseline looks
MODEL = "Qwen/Qwen3-1.7B"


@dataclass(frozen=True)
class Run:
    """A finished training: its looks, and its best checkpoint's value on other prompts where there are any."""

    rank: int
    learning_rate: float
    seed: int
    points: tuple[EvalPoint, ...]
    test: tuple[float, ...] = ()

    def outcome(self, arm: Arm, margin: float) -> TrialOutcome:
        """As the executor of custom trainers judges it."""
        identity = trial_id("replay", arm)
        fall = collapse_of(self.points, DROP_IN_MARGINS * margin)
        if fall is not None:
            return TrialCollapsed(trial_id=identity, **arm.model_dump(), **fall)
        return TrialFinished(
            trial_id=identity,
            **arm.model_dump(),
            value=self.value,
            metrics={"reward": self.value},
            item_scores=list(self.test) or None,
            **UNMEASURED,
        )

    @property
    def value(self) -> float:
        """Of the best checkpoint: on the test prompts, or where there are none on those that chose it."""
        return sum(self.test) / len(self.test) if self.test else best_point(self.points, True).value

    @property
    def end(self) -> float:
        return self.points[-1].value

    def at(self, part: float) -> float:
        """The look at this part of the steps, or the last one before it."""
        last = self.points[-1].step * part
        return [point.value for point in self.points if point.step <= last][-1]


Grid = dict[tuple[int, float, int], Run]


def live_grid(path: Path = LIVE) -> Grid:
    runs = [
        Run(
            one["rank"], one["learning_rate"], one["seed"],
            tuple(_point(step, list(map(float, bits))) for step, bits in one["points"]), tuple(map(float, one["test"])),
        )
        for one in json.loads(path.read_text())["runs"]
    ]  # fmt: skip
    return {(run.rank, run.learning_rate, run.seed): run for run in runs}


def _point(step: int, scores: list[float]) -> EvalPoint:
    return EvalPoint(step=step, value=sum(scores) / len(scores), item_scores=scores)


def public_grid(path: Path) -> Grid:
    """The LoRA runs of the grid's main model."""
    with sqlite3.connect(path) as file:
        runs = file.execute("select id, lora_rank, lr, seed from runs where model_id = ? and lora_rank > 0", (MODEL,))
        asked = (
            "select step, eval_accuracy from run_history where run_id = ? and eval_accuracy is not null order by step"
        )
        looks = {run: file.execute(asked, (run[0],)).fetchall() for run in runs.fetchall()}
    return {
        run[1:]: Run(*run[1:], tuple(EvalPoint(step=step, value=value) for step, value in found))
        for run, found in looks.items()
        if found
    }


@dataclass(frozen=True)
class Replayed:
    """One replay: what was decided and handed over, and what it cost."""

    decision: Decision | None
    trainings: int
    collapsed: int
    handed_over: Run | None


def replay(grid: Grid, learning_rates: Sequence[float], seeds: Sequence[int], margin: float = MARGIN) -> Replayed:
    """Run the profile on stored trainings, whose order of seeds is `seeds`."""
    ranks = tuple(sorted({rank for rank, _, _ in grid}))
    space = Space(
        ranks=ranks, learning_rates=tuple(learning_rates), seeds=tuple(range(len(seeds))), lora_alpha=32.0, steps=100,
        margin=margin, metric="reward", kind="other", higher_is_better=True, evaluates_base=False, stages=False,
        truncates=False,
    )  # fmt: skip
    strategy, outcomes = Upward(space), list[TrialOutcome]()
    while arms := strategy.ask(outcomes):
        outcomes += [grid[arm.rank, arm.learning_rate, seeds[arm.seed]].outcome(arm, margin) for arm in arms]
    collapsed = sum(isinstance(one, TrialCollapsed) for one in outcomes)
    try:
        table = table_of(without_collapsing(outcomes), "reward", True)
        decision = decision_of(table, margin, smallest_if_alike=True)
    except ResultsError:
        return Replayed(None, len(outcomes), collapsed, None)
    chosen = next(one for one in decision.ranks if one.rank == decision.rank_at_hand)
    cells = [one for one in outcomes if isinstance(one, TrialFinished) and one.trial_id in chosen.trial_ids]
    best = max(cells, key=lambda one: (one.value, -one.seed))
    handed_over = grid[best.rank, best.learning_rate, seeds[best.seed]]
    return Replayed(decision, len(outcomes), collapsed, handed_over)


def early_leader(grid: Grid, learning_rates: Sequence[float], seed: int) -> Run:
    """The baseline: the run of the seed with the best value at a fifth of the steps. Its end is handed over."""
    runs = [run for run in grid.values() if run.seed == seed and run.learning_rate in learning_rates]
    return max(runs, key=lambda run: run.at(EARLY))


def study(grid: Grid, sizes: Sequence[int], draws: int = 200, margin: float = MARGIN) -> dict[str, Any]:
    """Replays over subsets of the learning rates that every rank has, and orders of the seeds."""
    ranks = sorted({rank for rank, _, _ in grid})
    seeds = sorted({seed for _, _, seed in grid})
    rates = [lr for lr in sorted({lr for _, lr, _ in grid}) if all((r, lr, s) in grid for r in ranks for s in seeds)]
    cases = [(subset, order) for size in sizes for subset in combinations(rates, size) for order in permutations(seeds)]
    cases = cases if len(cases) <= draws else random.Random(0).sample(cases, draws)
    found = [(subset, replay(grid, subset, order, margin)) for subset, order in cases]
    decided = [(subset, one) for subset, one in found if one.decision is not None and one.handed_over is not None]
    leaders = [early_leader(grid, subset, order[0]) for subset, order in cases]
    regrets = [_regret(grid, subset, one.handed_over.value) for subset, one in decided if one.handed_over]
    verdicts = [one.decision.verdict for _, one in decided if one.decision]
    chosen = [one.decision.rank_at_hand for _, one in decided if one.decision]
    whole = [len(ranks) * len(subset) * len(seeds) for subset, _ in found]
    return {
        "runs": len(grid),
        "runs that collapsed": sum(collapse_of(run.points, DROP_IN_MARGINS * margin) is not None for run in grid.values()),
        "ranks": ranks,
        "learning rates": rates,
        "seeds": len(seeds),
        "replays": len(found),
        "without a decision": len(found) - len(decided),
        "handed over a run that collapsed": sum(_collapsed(one.handed_over, margin) for _, one in decided if one.handed_over),
        "answers": {str(rank): chosen.count(rank) for rank in ranks},
        "verdicts": {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))},
        "value below the best checkpoint of the same learning rates": {
            "mean": round(sum(regrets) / len(regrets), 4), "largest": round(max(regrets), 4)
        },
        "trainings": {
            "mean": round(sum(one.trainings for _, one in found) / len(found), 1),
            "of the whole grid": round(sum(whole) / len(whole), 1),
        },
        "the early leader": {
            "handed over a run that collapsed": sum(_collapsed(run, margin) for run in leaders),
            "mean value at its end": round(sum(run.end for run in leaders) / len(leaders), 3),
        },
    }  # fmt: skip


def _collapsed(run: Run, margin: float) -> bool:
    return collapse_of(run.points, DROP_IN_MARGINS * margin) is not None


def _regret(grid: Grid, learning_rates: Sequence[float], value: float) -> float:
    return max(run.value for run in grid.values() if run.learning_rate in learning_rates) - value


def one_line(replayed: Replayed) -> dict[str, Any]:
    """A replay with all learning rates and the seeds in their order."""
    decision, run = replayed.decision, replayed.handed_over
    assert decision is not None
    assert run is not None
    return {
        "rank": decision.rank, "verdict": decision.verdict, "learning rate": run.learning_rate, "value": round(run.value, 4),
        "trainings": replayed.trainings, "of which collapsed": replayed.collapsed, "sentence": decision.sentence,
    }  # fmt: skip


def common_rates(grid: Grid) -> list[float]:
    cells = {(rank, seed) for rank, _, seed in grid}
    return [lr for lr in sorted({lr for _, lr, _ in grid}) if all((r, lr, s) in grid for r, s in cells)]


def main(arguments: list[str]) -> None:
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    grids = {"live": (live_grid(), (2, 3))} if LIVE.exists() else {}
    if arguments:
        grids["public"] = (public_grid(Path(arguments[0])), (3, 4))
    for name, (grid, sizes) in grids.items():
        seeds = sorted({seed for _, _, seed in grid})
        whole = one_line(replay(grid, common_rates(grid), seeds))
        stored[name] = {"margin": MARGIN, "all learning rates": whole, "subsets": study(grid, sizes)}
        print(name, json.dumps(stored[name], indent=1))
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
