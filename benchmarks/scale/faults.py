"""What is done to a run over workers, and whether it still comes to the decision of a run in one process.

    python -m benchmarks.scale.faults --tries 3 --seed 0 --out benchmarks/scale/results/faults.json

Every try is the whole command on a small real model, on real processes or on a real Ray cluster on this machine, with
one fault at a moment drawn from the seed. A trial is lost where the journal ends without it, doubled where it is there twice.
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
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tests.tiny import save_tiny_llama, write_completions

from benchmarks.machine import machine

SETTINGS = [
    "--strategy", "grid", "--ranks", "1,4,8", "--learning-rates", "3e-3,1e-2", "--max-steps", "40", "--batch-size", "4",
    "--seq-len", "32", "--eval-items", "12", "--device", "cpu", "--set", "samples=0", "--set", "checkpoint_seconds=0.2",
]  # fmt: skip
WORKERS = 2
OVER = 5  # of all events, a fault comes within so many after the first training began


@dataclass(slots=True)
class Setting:
    """Where a try runs."""

    folder: Path
    model: Path
    data: Path
    cluster: Any = None  # a ray.cluster_utils.Cluster
    nodes: list[Any] | None = None


Fault = Callable[[Setting, subprocess.Popen[str]], None]


def workers_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """The worker processes, oldest first: the driver's own or Ray's."""
    own = [p for p in psutil.Process(driver.pid).children() if "rightrank.executors.worker" in " ".join(p.cmdline())]
    actors = [p for p in psutil.process_iter(["cmdline"]) if "ray::RayWorker" in " ".join(p.info["cmdline"] or [])]
    return sorted(own or actors, key=lambda process: process.create_time())


def kill_worker(_setting: Setting, driver: subprocess.Popen[str]) -> None:
    workers_of(driver)[0].kill()


def slow_worker(_setting: Setting, driver: subprocess.Popen[str]) -> None:
    """Stopped for some seconds, then going on: not given up, nothing counted twice."""
    worker = workers_of(driver)[0]
    worker.suspend()
    time.sleep(8)
    worker.resume()


def hung_worker(_setting: Setting, driver: subprocess.Popen[str]) -> None:
    """Stopped for good: given up after `hang_seconds` and replaced."""
    workers_of(driver)[0].suspend()


def kill_node(setting: Setting, _driver: subprocess.Popen[str]) -> None:
    assert setting.nodes is not None
    setting.cluster.remove_node(setting.nodes[0], allow_graceful=False)


def kill_driver(_setting: Setting, driver: subprocess.Popen[str]) -> None:
    """The same command is given again by `one_try`."""
    driver.kill()


def nothing(_setting: Setting, _driver: subprocess.Popen[str]) -> None:
    """Nodes of different size and no fault."""


FAULTS: dict[tuple[str, str], tuple[Fault, list[str]]] = {
    ("processes", "worker killed"): (kill_worker, []),
    ("processes", "worker slow for 8 s"): (slow_worker, []),
    ("processes", "worker hung"): (hung_worker, ["--set", "hang_seconds=5"]),
    ("processes", "driver killed, same command again"): (kill_driver, []),
    ("ray", "nodes of different size, no fault"): (nothing, []),
    ("ray", "worker killed"): (kill_worker, []),
    ("ray", "worker slow for 8 s"): (slow_worker, []),
    ("ray", "node killed"): (kill_node, []),
    ("ray", "driver killed, same command again"): (kill_driver, []),
}


@contextmanager
def small_cluster(setting: Setting) -> Iterator[list[str]]:
    """A head without cores and nodes of one and of two; the options that lead there."""
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 80 * 2**20}
    setting.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **store})
    try:
        setting.nodes = [setting.cluster.add_node(num_cpus=cpus, **store) for cpus in (1, 2)]
        yield ["--ray-address", setting.cluster.address]
    finally:
        setting.cluster.shutdown()


def begin(setting: Setting, options: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rightrank", "select", str(setting.model), str(setting.data)]
    return subprocess.Popen(
        [*command, "--out", str(setting.folder), *SETTINGS, "--log-json", *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def wait_for(driver: subprocess.Popen[str], events: int) -> bool:
    """Until so many steps and outcomes after the first training began; False where the run ended before."""
    assert driver.stderr is not None
    seen = 0
    for line in driver.stderr:
        event = json.loads(line) if line.startswith("{") else {}
        seen += event.get("event") in ("step_done", "trial_finished") and bool(seen or event["event"] == "step_done")
        if seen >= events:
            return True
    return False


def ended(driver: subprocess.Popen[str]) -> int:
    assert driver.stderr is not None
    said = driver.stderr.read()
    status = driver.wait()
    if status not in (0, -signal.SIGKILL):
        print(said[-600:], file=sys.stderr)
    return status


def one_try(setting: Setting, fault: Fault, options: list[str], events: int) -> dict[str, Any]:
    begun = time.monotonic()
    driver = begin(setting, options)
    struck = wait_for(driver, events)
    if struck:
        fault(setting, driver)
    status = ended(driver)
    if fault is kill_driver:
        status = ended(begin(setting, options))
    return {"struck": struck, "events": events, "status": status, "seconds": round(time.monotonic() - begun, 1)}


def outcome_of(folder: Path) -> tuple[dict[str, Any], Counter[str], Counter[str]]:
    """The decision without its measured seconds, and how often each trial finished and began."""
    records = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    decision = json.loads((folder / "decision.json").read_text()) if (folder / "decision.json").exists() else {}
    for further in decision.get("next_runs", []):
        further.pop("seconds", None)
    finished = Counter(record["trial_id"] for record in records if record["type"] == "trial_finished")
    return decision, finished, Counter(record["trial_id"] for record in records if record["type"] == "trial_started")


def judged(setting: Setting, reference: Path, tried: dict[str, Any]) -> dict[str, Any]:
    decision, finished, started = outcome_of(setting.folder)
    right, wanted, _ = outcome_of(reference)
    return tried | {
        "same_decision": tried["status"] == 0 and decision == right,
        "lost": len(set(wanted) - set(finished)),
        "doubled": sum(count - 1 for count in finished.values()),
        "begun_again": sum(count - 1 for count in started.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of an executor's or a fault's name")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model, data = save_tiny_llama(root / "model"), write_completions(root / "data.jsonl")
        reference = Setting(root / "alone", model, data)
        assert ended(begin(reference, [])) == 0
        for (executor, name), (fault, further) in FAULTS.items():
            if options.only not in f"{executor} {name}":
                continue
            tries = []
            for number in range(options.tries):
                setting = Setting(root / f"{len(rows)}-{number}", model, data)
                chosen = ["--executor", executor, "--workers", str(WORKERS), *further]
                events = generator.randint(1, OVER)
                if executor == "ray":
                    with small_cluster(setting) as address:
                        tried = one_try(setting, fault, [*chosen, *address], events)
                else:
                    tried = one_try(setting, fault, chosen, events)
                tries.append(judged(setting, reference.folder, tried))
                print(executor, name, tries[-1], flush=True)
            rows.append({"executor": executor, "fault": name, "tries": tries})
            found = {"machine": machine(), "seed": options.seed, "workers": WORKERS, "rows": rows}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| executor | fault | tried | right decision | trials lost | doubled | begun again |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        tries = [one for one in row["tries"] if one["struck"]]
        sums = [sum(one[name] for one in tries) for name in ("same_decision", "lost", "doubled", "begun_again")]
        lines.append(f"| {row['executor']} | {row['fault']} | {len(tries)} | " + " | ".join(map(str, sums)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
