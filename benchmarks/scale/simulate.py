"""10,000 trials on 512 devices: the pool's own code in simulated time.

    python -m benchmarks.scale.simulate --out benchmarks/scale/results/simulated.json

What is simulated is how long trials take, and which workers die. What is measured is the processor time that driver code
takes for each trial (an upper bound: the simulator's own is in it) and how fast a journal on this disk grows.
The bound on the makespan is the largest of the work over the devices, the longest trial, and the sum of the two trials
that must share a device when the longest come first (the m-th and the next one).
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.scale.simulated import TOKEN, VERSIONS, Pace, SimulatedCrew, result_of
from rightrank.plugins.cluster.pool import Pool, PoolOptions
from rightrank.runs.journal import Journal
from rightrank.schema.settings import make_settings
from rightrank.schema.trials import Arm, Trial, TrialOutcome
from rightrank.search.history import History
from rightrank.search.strategies import make_strategy

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
SECONDS_A_STEP = 0.5
START = 60.0  # seconds before a worker has its base
HAND_OVER = 0.05


def lower_bound(seconds: Sequence[float], workers: int) -> float:
    """Of the makespan on identical machines."""
    ordered = sorted(seconds, reverse=True)
    paired = ordered[workers - 1] + ordered[workers] if len(ordered) > workers else 0.0
    return max(sum(ordered) / workers, ordered[0], paired)


def drawn_trials(job: str, count: int, generator: random.Random) -> list[Trial]:
    """Trainings of 100 to 2,000 steps, each length as likely on a logarithmic scale."""
    arms = [
        Arm(
            rank=RANKS[number % len(RANKS)],
            learning_rate=1e-3,
            lora_alpha=32.0,
            seed=number,
            steps=round(100 * 20 ** generator.random()),
        )
        for number in range(count)
    ]
    return [Trial(trial_id=f"{job}-{number}", arm=arm) for number, arm in enumerate(arms)]


def seconds_of(seed: int) -> Callable[[str, Trial], float]:
    """Steps times a pace that differs from trial to trial by a fifth; what the scheduler does not know."""

    def seconds(_worker: str, trial: Trial) -> float:
        return trial.arm.steps * SECONDS_A_STEP * random.Random(f"{seed} {trial.trial_id}").lognormvariate(0, 0.2)

    return seconds


def grid_of(trials: int, workers: int, seed: int, mean_hours_to_loss: float | None) -> dict[str, Any]:
    """All trials known at the start, as `grid` asks for them."""
    wanted = drawn_trials("grid", trials, random.Random(seed))
    pace = Pace(seconds_of(seed), START, HAND_OVER, step=300.0)

    def life(worker: str) -> float | None:
        if mean_hours_to_loss is None:
            return None
        return random.Random(f"{seed} {worker}").expovariate(1 / (3600 * mean_hours_to_loss))

    crew = SimulatedCrew(pace, ends_at=life)
    pool = Pool(crew, PoolOptions(workers, VERSIONS, TOKEN), clock=crew.clock)
    begun = time.process_time()
    pool.submit("grid", wanted, 1.0)
    ended = [outcome.trial_id for _, outcome in pool.outcomes()]
    spent = time.process_time() - begun
    bound = START + lower_bound([pace.trial("", trial) for trial in wanted], workers)
    return {
        "what": "grid, all trials known"
        if mean_hours_to_loss is None
        else f"the same, a worker lost every {mean_hours_to_loss:g} h",
        "trials": len(ended),
        "workers": workers,
        "each_once": len(ended) == len(set(ended)) == trials,
        "begun_again": len(crew.trained) - trials,
        "makespan_hours": crew.now / 3600,
        "makespan_over_bound": crew.now / bound,
        "busy": sum(pace.trial("", trial) for trial in wanted) / (workers * crew.now),  # what was lost is not counted
        "driver_ms_a_trial": 1000 * spent / trials,
    }


class Asking:
    """A data set whose strategy asks; its results are planted, and nothing is written."""

    def __init__(self, name: str, strategy: str, generator: random.Random) -> None:
        self.name = name
        steps = round(100 * 20 ** generator.random())
        settings = make_settings({"strategy": strategy, "ranks": RANKS, "max_steps": steps})
        self._strategy = make_strategy(settings, steps)
        self._enough = generator.choice(RANKS)
        self.outcomes: list[TrialOutcome] = []

    def wanted(self) -> list[Trial]:
        arms = self._strategy.ask(History.of(self.outcomes))
        return [Trial(trial_id=f"{self.name}-{len(self.outcomes) + n}", arm=arm) for n, arm in enumerate(arms)]

    def keep(self, outcome: TrialOutcome) -> None:
        gap = 0.0 if outcome.rank >= self._enough else 0.05
        loss = 3.0 if outcome.rank == 0 else 1.0 + gap + abs(outcome.learning_rate - 1e-3) * 10
        self.outcomes.append(
            result_of(Trial(trial_id=outcome.trial_id, arm=outcome.arm)).model_copy(
                update={"value": loss, "metrics": {"loss": loss}, "item_losses": [loss] * 4}
            )
        )


def asked_of(data_sets: int, workers: int, strategy: str, seed: int) -> dict[str, Any]:
    """Many data sets over the same workers, each strategy asking on as its results come."""
    generator = random.Random(seed)
    asking = {f"{n}": Asking(f"{n}", strategy, generator) for n in range(data_sets)}

    def seconds(worker: str, trial: Trial) -> float:
        arm = trial.arm
        steps = max(20, arm.stop_at or arm.steps)  # the base and a cut: an evaluation
        return steps * SECONDS_A_STEP * random.Random(f"{seed} {trial.trial_id}").lognormvariate(0, 0.2)

    durations: list[float] = []
    crew = SimulatedCrew(
        Pace(lambda worker, trial: durations.append(seconds(worker, trial)) or durations[-1], START, HAND_OVER, 300.0)
    )
    pool = Pool(crew, PoolOptions(workers, VERSIONS, TOKEN), clock=crew.clock)
    scheduling = 0.0
    begun = time.process_time()
    for name, one in asking.items():
        pool.submit(name, one.wanted(), 1.0)
    for name, outcome in pool.outcomes():
        asking[name].keep(outcome)
        if not pool.is_waiting(name):
            before = time.process_time()
            more = asking[name].wanted()
            scheduling += time.process_time() - before
            if more:
                pool.submit(name, more, 1.0)
    spent = time.process_time() - begun
    trials = sum(len(one.outcomes) for one in asking.values())
    return {
        "what": f"{data_sets} data sets by {strategy}",
        "trials": trials,
        "workers": workers,
        "each_once": trials == len(crew.trained),
        "begun_again": 0,
        "makespan_hours": crew.now / 3600,
        "makespan_over_bound": crew.now / (START + lower_bound(durations, workers)),
        "busy": crew.busy_seconds / (workers * crew.now),
        "driver_ms_a_trial": 1000 * spent / trials,
        "of_which_strategy_ms": 1000 * scheduling / trials,
    }


def journal_throughput(records: int) -> dict[str, float]:
    """Outcomes a second, each on the disk before the next."""
    trial = Trial(trial_id="a", arm=Arm(rank=8, learning_rate=1e-3, lora_alpha=32.0, seed=0, steps=100))
    outcome = result_of(trial).model_copy(update={"item_losses": [1.0] * 200, "item_tokens": [10] * 200})
    with tempfile.TemporaryDirectory(dir=".") as folder:
        journal = Journal(Path(folder) / "journal.jsonl")
        begun = time.perf_counter()
        for _ in range(records):
            journal.append(outcome)
        seconds = time.perf_counter() - begun
    return {"records": records, "items_each": 200, "records_a_second": records / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [
        grid_of(options.trials, options.workers, options.seed, None),
        grid_of(options.trials, options.workers, options.seed, 24.0),
        grid_of(options.trials, options.workers, options.seed, 2.0),
        asked_of(options.trials // 10, options.workers, "bracket", options.seed),
        asked_of(max(1, options.trials // 1000), options.workers, "bracket", options.seed),
    ]
    found = {"machine": machine(), "seed": options.seed, "rows": rows, "journal": journal_throughput(500)}
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows))
    print(f"journal: {found['journal']['records_a_second']:.0f} records a second")  # type: ignore[index]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| what | trials | workers | makespan, h | over the bound | busy | begun again | driver, ms a trial |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['what']} | {row['trials']} | {row['workers']} | {row['makespan_hours']:.2f} | {row['makespan_over_bound']:.3f} | "
        f"{row['busy']:.0%} | {row['begun_again']} | {row['driver_ms_a_trial']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
