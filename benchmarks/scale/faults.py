"""What is done to a run over workers, and whether it still comes to the decision of a run without a fault.

    python -m benchmarks.scale.faults --tries 20 --seed 0 --out benchmarks/scale/results/faults.json
    python -m benchmarks.scale.faults --engine --tries 2 --seed 0 --out benchmarks/scale/results/faults-engine.json

The loop, the journal, the pool and the workers' processes or Ray actors are the real ones. Workers sleep where they would
train, so that there can be many tries; with `--engine` they train a small real model, and the whole command is run. Each
try has one fault, at a moment drawn from the seed. A trial is lost where the journal ends without it, trained twice where
it ended twice. Tries go round by round over all faults, and what is found is stored after each: stopped early
(`--minutes`, or a signal), the table holds what was tried.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tiny import save_tiny_llama, write_completions

from benchmarks.machine import machine
from benchmarks.scale.places import (
    HANG_SECONDS,
    LIMIT_SECONDS,
    Fault,
    Nodes,
    Place,
    drive,
    drive_forked,
    hung_worker,
    kill_driver,
    kill_node,
    kill_worker,
    killed_and_resumed,
    nothing,
    ray_nodes,
    slow_worker,
)
from rightrank.schema.errors import RightrankError

ENGINE = [
    "--strategy", "grid", "--ranks", "1,4", "--learning-rates", "3e-3,1e-2", "--max-steps", "30", "--batch-size", "4",
    "--seq-len", "32", "--eval-items", "12", "--device", "cpu", "--set", "checkpoint_seconds=0.2",
]  # fmt: skip
FAULTS: dict[tuple[str, str], Fault] = {
    ("processes", "worker killed"): kill_worker,
    ("processes", "worker stopped for 4 s"): slow_worker,
    ("processes", "worker hung"): hung_worker,
    ("processes", "driver killed, then resumed"): kill_driver,
    ("ray", "nodes of different size, no fault"): nothing,
    ("ray", "worker killed"): kill_worker,
    ("ray", "worker stopped for 4 s"): slow_worker,
    ("ray", "worker hung"): hung_worker,
    ("ray", "node killed"): kill_node,
    ("ray", "driver killed, then resumed"): kill_driver,
}
FAILED = {"right_decision": 0, "lost": 0, "trained_twice": 0, "begun_again": 0}


@dataclass(frozen=True, slots=True)
class Work:
    """What is run in every try: sleeping workers, or the whole command on a small real model."""

    reference: Path  # a run without a fault
    model: Path | None = None
    data: Path | None = None

    @property
    def most_before(self) -> int:
        """Outcomes after which the fault may come."""
        return 9 if self.model is None else 3

    def make_reference(self) -> None:
        if self.model is None:
            drive(Place("processes", self.reference), lambda: None, 0)
            return
        assert self.data is not None
        save_tiny_llama(self.model), write_completions(self.data)
        self.run(Place("local", self.reference), nothing, 1)

    def run(self, place: Place, fault: Fault, after: int) -> None:
        if self.model is not None:
            self._run_command(place, fault, after)
        elif fault is kill_driver:
            killed, resumed = killed_and_resumed(place, after)
            require(killed == -signal.SIGKILL, "the driver was not killed")
            require(resumed == 0, "the resumed driver failed")
        else:
            seconds = HANG_SECONDS if fault is hung_worker else 600.0
            drive(place, lambda: hit(place, fault), after, seconds)
            require(place.is_hit, "it ended before the fault")

    def _run_command(self, place: Place, fault: Fault, after: int) -> None:
        """The fault once so many trials have ended."""
        driver = self._command(place)
        until = time.monotonic() + LIMIT_SECONDS
        try:
            while driver.poll() is None and ended_trials(place.folder) < after:
                time.sleep(0.05)
            require(driver.poll() is None or fault is nothing, "it ended before the fault")
            if fault is kill_driver:
                driver.kill()
                driver.wait()
                driver = self._command(place)
            else:
                fault(place)
            require(driver.wait(timeout=max(1.0, until - time.monotonic())) == 0, "the command failed")
        finally:
            driver.kill()

    def _command(self, place: Place) -> subprocess.Popen[bytes]:
        options = [] if place.executor == "local" else ["--executor", place.executor, "--workers", "2"]
        address = {} if place.address is None else {"RAY_ADDRESS": place.address}
        command = [sys.executable, "-m", "rightrank", "select", str(self.model), str(self.data)]
        where = ["--out", str(place.folder), "--quiet"]
        return subprocess.Popen(
            [*command, *where, *ENGINE, *options],
            env=os.environ | address,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


class TryError(Exception):
    """A try that did not come to its end."""


def hit(place: Place, fault: Fault) -> None:
    fault(place)
    place.is_hit = True


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise TryError(otherwise)


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
        "trained_twice": sum(count - 1 for count in finished.values()),
        "begun_again": sum(count - 1 for count in started.values()),
    }


def one_try(work: Work, place: Place, fault: Fault, after: int) -> dict[str, Any]:
    begun = time.monotonic()
    try:
        work.run(place, fault, after)
        found = judged(place.folder, work.reference)
    except (RightrankError, TryError, subprocess.TimeoutExpired) as error:
        found = {**FAILED, "error": str(error), "notices": place.notices}
    return {"after": after, "seconds": round(time.monotonic() - begun, 1), **found}


def run_all(options: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    random.seed(options.seed)
    work = Work(root / "reference", *((root / "model", root / "data.jsonl") if options.engine else ()))
    work.make_reference()
    faults = {key: fault for key, fault in FAULTS.items() if options.only in " ".join(key)}
    if options.engine:  # the command waits ten minutes for a worker that hangs
        faults = {key: fault for key, fault in faults.items() if fault is not hung_worker}
    rows = {key: {"executor": key[0], "fault": key[1], "tries": []} for key in faults}
    until = time.monotonic() + 60 * options.minutes
    with ray_nodes(any(executor == "ray" for executor, _ in faults)) as nodes:
        for number in range(options.tries):
            for key, fault in faults.items():
                if time.monotonic() > until:
                    return list(rows.values())
                folder = root / f"{list(faults).index(key)}-{number}"
                found = one_try(work, placed(key[0], folder, nodes), fault, random.randint(1, work.most_before))
                rows[key]["tries"].append(found)
                print(*key, found, flush=True)
                store(options, list(rows.values()))
    return list(rows.values())


def placed(executor: str, folder: Path, nodes: Nodes | None) -> Place:
    if executor != "ray":
        return Place(executor, folder)
    assert nodes is not None
    nodes.make_whole()
    return Place(executor, folder, nodes, nodes.address)


def store(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if options.out is None:
        return
    found = {"machine": machine(), "seed": options.seed, "engine": options.engine, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| executor | fault | tried | right decision | trials lost | trained twice | begun again |",
        "|---|---|---|---|---|---|---|",
    ]
    tries: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        tries.setdefault((row["executor"], row["fault"]), []).extend(row["tries"])
    for (executor, fault), found in tries.items():
        sums = [sum(one[name] for one in found) for name in ("right_decision", "lost", "trained_twice", "begun_again")]
        lines.append(f"| {executor} | {fault} | {len(found)} | " + " | ".join(map(str, sums)) + " |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--drive"]:
        executor, folder, after, *address = sys.argv[2:]
        place = Place(executor, Path(folder), address=address[0] if address else None)
        print(json.dumps([drive_forked(place, int(after)), drive_forked(place, 0)]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="no try is begun later than this")
    parser.add_argument("--engine", action="store_true", help="train a small real model")
    parser.add_argument("--only", default="", help="part of an executor's or a fault's name")
    parser.add_argument("--out", type=Path, help="where what is found is stored")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of stored runs, and run nothing")
    options = parser.parse_args()
    if options.table:
        print(table([row for path in options.table for row in json.loads(path.read_text())["rows"]]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        print(table(run_all(options, Path(temporary))))


if __name__ == "__main__":
    main()
