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
from benchmarks.scale.simulated import VERSIONS, Pace, SimulatedCrew, result_of
from rightrank.plugins.cluster.pool import Pool
from rightrank.runs.journal import Journal
from rightrank.schema.trials import Arm, Trial

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
    pool = Pool(crew, workers, VERSIONS, clock=crew.clock)
    begun = time.process_time()
    ended = [outcome.trial_id for outcome in pool.run(wanted, 1.0)]
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
