"""The simulated scheduler held against real workers, and what the driver and Ray's store hold after 1,000 trials.

    python -m benchmarks.scale.measure --out benchmarks/scale/results/measured.json

Workers are real processes, or real actors on a Ray cluster of two nodes on this machine, that sleep where they would
train: so one machine of few cores can stand for several. One worker gives what a start and a hand-over take; the
simulation with these predicts the makespan of 2, 3 and 4.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import machine
from benchmarks.scale.simulate import lower_bound
from benchmarks.scale.simulated import VERSIONS, Pace, SimulatedCrew
from benchmarks.scale.stub_worker import StubRayWorker, StubWorker
from rightrank.plugins.cluster.on_ray import RayCrew
from rightrank.plugins.cluster.pool import Crew, Pool
from rightrank.plugins.cluster.processes import ProcessCrew
from rightrank.plugins.cluster.worker import Setup, versions
from rightrank.runs.values import Request
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, Trial

COUNTS = (1, 2, 3, 4)


def sleeping_trials(count: int, low: int, high: int, seed: int) -> list[Trial]:
    """`steps` is how many milliseconds a trial sleeps."""
    generator = random.Random(seed)
    arms = [
        Arm(rank=1 + n, learning_rate=1e-3, lora_alpha=1.0, seed=n, steps=generator.randint(low, high))
        for n in range(count)
    ]
    return [Trial(trial_id=f"t{n}", arm=arm) for n, arm in enumerate(arms)]


def setup_in(folder: Path) -> Setup:
    """Of a selection of sleeping workers."""
    (folder / "journal.jsonl").touch()  # which they look for
    request = Request("", None, "", SelectSettings())
    return Setup(request, fingerprint="", folder=folder, working_folder=Path.cwd())


@contextmanager
def process_crew(folder: Path) -> Iterator[Crew]:
    yield ProcessCrew(setup_in(folder), folder / "workers", kind=StubWorker)


@contextmanager
def ray_crew(folder: Path) -> Iterator[RayCrew]:
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **store})
    try:
        cluster.add_node(num_cpus=4, **store)
        os.environ["RAY_ADDRESS"] = cluster.address
        yield RayCrew(setup_in(folder), None, on_cuda=False, actor=StubRayWorker)
    finally:
        cluster.shutdown()


def timed(crew: Crew, trials: Sequence[Trial], workers: int) -> dict[str, float]:
    """Seconds until the first start is reported, and from there to the last outcome."""
    pool = Pool(crew, workers, versions())
    list(pool.run(sleeping_trials(workers, 1000, 1000, 0), None))  # all are up before the clock starts
    begun, spent = time.perf_counter(), time.process_time()
    ended = [outcome.trial_id for outcome in pool.run(trials, None)]
    assert len(ended) == len(set(ended)) == len(trials)
    seconds, spent = time.perf_counter() - begun, time.process_time() - spent
    pool.close()
    return {"seconds": seconds, "driver_ms_a_trial": 1000 * spent / len(trials)}


def predicted(trials: Sequence[Trial], workers: int, hand_over: float) -> float:
    crew = SimulatedCrew(Pace(lambda _, trial: trial.arm.steps / 1000, hand_over=hand_over))
    pool = Pool(crew, workers, VERSIONS, clock=crew.clock)
    list(pool.run(trials, None))
    return crew.now


def against_model(trials: Sequence[Trial]) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    sleeping = [trial.arm.steps / 1000 for trial in trials]
    hand_over = 0.0
    for workers in COUNTS:
        with tempfile.TemporaryDirectory() as folder, process_crew(Path(folder)) as crew:
            found = timed(crew, trials, workers)
        if workers == 1:
            hand_over = (found["seconds"] - sum(sleeping)) / len(trials)
        model = predicted(trials, workers, hand_over)
        rows.append(
            {
                "workers": workers,
                **found,
                "hand_over_ms": 1000 * hand_over,
                "model_seconds": model,
                "model_error": model / found["seconds"] - 1,
                "over_bound": found["seconds"] / lower_bound(sleeping, workers),
            }
        )
        print(rows[-1], flush=True)
    return rows


def held_by_ray(counts: Sequence[int]) -> list[dict[str, float]]:
    """The driver's resident memory and the bytes in Ray's store after so many more trials of nothing."""
    import ray

    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, ray_crew(Path(folder)) as crew:
        pool = Pool(crew, 4, versions())
        done = 0
        for count in counts:
            begun = time.perf_counter()
            assert sum(1 for _ in pool.run(sleeping_trials(count, 1, 1, count), None)) == count
            done += count
            whole = ray.cluster_resources()["object_store_memory"]
            rows.append(
                {
                    "trials": done,
                    "driver_mib": psutil.Process().memory_info().rss / 2**20,
                    "store_bytes": whole - ray.available_resources().get("object_store_memory", 0.0),
                    "ms_a_trial": 1000 * (time.perf_counter() - begun) / count,
                }
            )
            print(rows[-1], flush=True)
        pool.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine()}
    found["ray"] = held_by_ray((100, 400, 500))
    found["model"] = against_model(sleeping_trials(options.trials, 300, 3000, 0))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
