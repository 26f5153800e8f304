"""What is done to a run over workers, and whether it still comes to the decision of a run without a fault.

    python -m benchmarks.scale.faults --tries 20 --seed 0 --out benchmarks/scale/results/faults.json
    python -m benchmarks.scale.faults --engine --tries 1 --seed 0 --out benchmarks/scale/results/faults-engine.json

The loop, the journal, the pool and the workers' processes or Ray actors are the real ones. Workers sleep where they would
train, so that there can be many tries; with `--engine` they train a small real model, and the whole command is run. Each
try has one fault, at a moment drawn from the seed. A trial is lost where the journal ends without it, doubled where it
ended twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tests.tiny import save_tiny_llama, write_completions

from benchmarks.machine import machine
from benchmarks.scale.measure import STUB, orders_in
from benchmarks.scale.simulated import TOKEN
from benchmarks.scale.stub_worker import StubRayWorker
from rightrank.executors.pool import Crew, Looking, Pool, PoolExecutor, Terms
from rightrank.executors.processes import ProcessCrew
from rightrank.executors.ray_cluster import RayCrew
from rightrank.executors.worker import versions
from rightrank.io.run_folder import RunFolder
from rightrank.records import DataSummary, RunEvent, RunStarted, TrialFinished
from rightrank.selection import Selection
from rightrank.settings import make_settings
from rightrank.strategies import make_strategy

WORKERS = 3
STEPS = 700  # of a sleeping trial: milliseconds
ENGINE = [
    "--strategy", "grid", "--ranks", "1,4", "--learning-rates", "3e-3,1e-2", "--max-steps", "30", "--batch-size", "4",
    "--seq-len", "32", "--eval-items", "12", "--device", "cpu", "--set", "samples=0", "--set", "checkpoint_seconds=0.2",
]  # fmt: skip
STORE = {"object_store_memory": 80 * 2**20}


@dataclass(slots=True)
class Place:
    """Where a try runs."""

    executor: str
    folder: Path
    cluster: Any = None  # a ray.cluster_utils.Cluster
    nodes: list[Any] | None = None
    address: str | None = None
    busy: Callable[[], list[int]] = list  # process ids of workers at work, where they are known
    notices: list[str] = field(default_factory=list)


Fault = Callable[[Place], None]


def workers_of(place: Place) -> list[psutil.Process]:
    """The worker processes below this one, oldest first."""
    name = "RayWorker" if place.executor == "ray" else "worker"
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            is_actor = line.startswith("ray::")
            if name in line and (is_actor if place.executor == "ray" else "-m " in line):
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def at_work(place: Place) -> psutil.Process:
    """A worker that has a trial under way, where that can be told; else the oldest."""
    until = time.monotonic() + 5
    while not (busy := place.busy()) and place.executor == "processes" and time.monotonic() < until:
        time.sleep(0.01)
    return psutil.Process(busy[0]) if busy else workers_of(place)[0]


def kill_worker(place: Place) -> None:
    at_work(place).kill()


def slow_worker(place: Place) -> None:
    """Stopped for a while, then going on: not given up, nothing counted twice."""
    worker = at_work(place)
    worker.suspend()
    threading.Timer(4.0, worker.resume).start()


def hung_worker(place: Place) -> None:
    """Stopped for good: given up after `hang_seconds` and replaced."""
    at_work(place).suspend()


def kill_node(place: Place) -> None:
    assert place.nodes is not None
    place.cluster.remove_node(place.nodes[0], allow_graceful=False)


def kill_driver(_place: Place) -> None:
    """The same command is then given again."""
    os.kill(os.getpid(), signal.SIGKILL)


def nothing(_place: Place) -> None:
    """Nodes of different size and no fault."""


FAULTS: dict[tuple[str, str], Fault] = {
    ("processes", "worker killed"): kill_worker,
    ("processes", "worker slow for 4 s"): slow_worker,
    ("processes", "worker hung"): hung_worker,
    ("processes", "driver killed, then resumed"): kill_driver,
    ("ray", "nodes of different size, no fault"): nothing,
    ("ray", "worker killed"): kill_worker,
    ("ray", "worker slow for 4 s"): slow_worker,
    ("ray", "worker hung"): hung_worker,
    ("ray", "node killed"): kill_node,
    ("ray", "driver killed, then resumed"): kill_driver,
}


@contextmanager
def placed(executor: str, folder: Path) -> Iterator[Place]:
    """A place; on Ray with a head that has no cores and nodes of two and of four."""
    place = Place(executor, folder)
    if executor != "ray":
        yield place
        return
    from ray.cluster_utils import Cluster

    place.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **STORE})
    try:
        place.address = place.cluster.address
        place.nodes = [place.cluster.add_node(num_cpus=cpus, **STORE) for cpus in (2, 4)]
        yield place
    finally:
        place.cluster.shutdown()


def crew_at(place: Place) -> Crew:
    orders = orders_in(place.folder)
    if place.executor == "ray":
        return RayCrew(orders, place.address, None, on_cuda=False, actor=StubRayWorker)
    return ProcessCrew(orders, place.folder / "workers", command=STUB)


def drive(place: Place, strike: Callable[[], None], after: int) -> None:
    """One selection over sleeping workers; the fault after so many outcomes of this drive."""
    folder = place.folder
    settings = make_settings({"strategy": "grid", "ranks": (1, 2, 4, 8), "learning_rates": (1e-3, 3e-3, 1e-2)})
    started = RunStarted(
        rightrank_version="benchmark",
        fingerprint="benchmark",
        settings={"model": "none", "data": "none", **settings.model_dump(mode="json")},
        environment={},
        data=DataSummary(form="text", splits={}, splits_given=False, duplicates_across_splits=0),
        evaluation_items=["a", "b", "c", "d"],
        metric="loss",
        higher_is_better=False,
        started_at="",
    )
    seen = 0

    def listen(event: RunEvent) -> None:
        nonlocal seen
        seen += isinstance(event, TrialFinished)
        if isinstance(event, TrialFinished) and seen == after:
            threading.Timer(random.Random(f"{folder.name} {after}").uniform(0, STEPS / 1000), strike).start()

    run_folder = RunFolder(folder)
    with run_folder.locked():
        selection = Selection(run_folder, started, make_strategy(settings, STEPS), listen)
        crew = crew_at(place)
        looking = Looking(on_start=lambda _, begun: selection.note_start(begun), notice=place.notices.append)
        pool = Pool(crew, Terms(WORKERS, versions(), TOKEN, hang_seconds=6.0), looking)
        if isinstance(crew, ProcessCrew):
            place.busy = lambda: [crew.process_id(name) for name in pool.busy()]
        try:
            decision = selection.run(PoolExecutor(pool, "job"))
        finally:
            pool.close()
        selection.write_views(decision)


def driven_elsewhere(place: Place, after: int) -> int:
    """A drive in a process of its own, which kills itself after so many outcomes; 0 for never."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.scale.faults",
        "--drive",
        place.executor,
        str(place.folder),
        str(after),
    ]
    address = [] if place.address is None else [place.address]
    return subprocess.run([*command, *address], check=False, stderr=subprocess.DEVNULL).returncode


def one_try(place: Place, fault: Fault, after: int) -> None:
    if fault is kill_driver:
        assert driven_elsewhere(place, after) == -signal.SIGKILL
        assert driven_elsewhere(place, 0) == 0
        return
    drive(place, lambda: fault(place), after)


def engine_try(place: Place, fault: Fault, after: int, model: Path, data: Path) -> None:
    """The whole command on a small real model; the fault once so many trials have ended."""

    def begin() -> subprocess.Popen[bytes]:
        options = [] if place.address is None else ["--ray-address", place.address]
        if place.executor != "local":
            options += ["--executor", place.executor, "--workers", "2"]
        options += ["--set", "hang_seconds=6"] if fault is hung_worker else []
        command = [sys.executable, "-m", "rightrank", "select", str(model), str(data), "--out", str(place.folder)]
        return subprocess.Popen([*command, *ENGINE, "--quiet", *options], stdout=subprocess.DEVNULL)

    driver = begin()
    while driver.poll() is None and ended_trials(place.folder) < after:
        time.sleep(0.05)
    if fault is kill_driver:
        driver.kill()
        driver.wait()
        driver = begin()
    else:
        fault(place)
    assert driver.wait() == 0


def ended_trials(folder: Path) -> int:
    journal = folder / "journal.jsonl"
    return journal.read_text().count('"type":"trial_finished"') if journal.exists() else 0


def outcome_of(folder: Path) -> tuple[dict[str, Any], Counter[str], Counter[str]]:
    """The decision without what is measured, and how often each trial finished and began."""
    records = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    decision = json.loads((folder / "decision.json").read_text())
    for measured in ("next_run", "next_runs"):  # they say what the next run would take
        decision.pop(measured)
    finished = Counter(record["trial_id"] for record in records if record["type"] == "trial_finished")
    return decision, finished, Counter(record["trial_id"] for record in records if record["type"] == "trial_started")


def judged(folder: Path, reference: Path) -> dict[str, Any]:
    decision, finished, started = outcome_of(folder)
    right, wanted, _ = outcome_of(reference)
    return {
        "right_decision": int(decision == right),
        "lost": len(set(wanted) - set(finished)),
        "doubled": sum(count - 1 for count in finished.values()),
        "begun_again": sum(count - 1 for count in started.values()),
    }


def run_all(options: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    generator = random.Random(options.seed)
    reference = root / "reference"
    model, data = root / "model", root / "data.jsonl"
    if options.engine:
        save_tiny_llama(model), write_completions(data)
        engine_try(Place("local", reference), nothing, 1, model, data)
    else:
        drive(Place("processes", reference), lambda: None, 0)
    rows: list[dict[str, Any]] = []
    for (executor, name), fault in FAULTS.items():
        if options.only not in f"{executor} {name}":
            continue
        row: dict[str, Any] = {"executor": executor, "fault": name, "tries": []}
        rows.append(row)
        for number in range(options.tries):
            begun = time.monotonic()
            after = generator.randint(1, 3 if options.engine else 9)
            with placed(executor, root / f"{len(rows)}-{number}") as place:
                engine_try(place, fault, after, model, data) if options.engine else one_try(place, fault, after)
                seconds = round(time.monotonic() - begun, 1)
                row["tries"].append({"after": after, "seconds": seconds, **judged(place.folder, reference)})
            print(executor, name, row["tries"][-1], flush=True)
        found = {"machine": machine(), "seed": options.seed, "engine": options.engine, "rows": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| executor | fault | tried | right decision | trials lost | doubled | begun again |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        names = ("right_decision", "lost", "doubled", "begun_again")
        sums = [sum(one[name] for one in row["tries"]) for name in names]
        lines.append(
            f"| {row['executor']} | {row['fault']} | {len(row['tries'])} | " + " | ".join(map(str, sums)) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--drive"]:
        executor, folder, after, *address = sys.argv[2:]
        place = Place(executor, Path(folder), address=address[0] if address else None)
        drive(place, lambda: kill_driver(place), int(after))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", action="store_true", help="train a small real model")
    parser.add_argument("--only", default="", help="part of an executor's or a fault's name")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(table(run_all(options, Path(temporary))))


if __name__ == "__main__":
    main()
