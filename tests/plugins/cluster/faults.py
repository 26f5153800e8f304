"""Inject faults into a run over workers, and check that it reaches the decision of a run without a fault.

The loop, the journal, the pool and the workers' processes or Ray actors are the real ones; workers sleep instead of training.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rightrank.schema.errors import RightrankError
from tests.plugins.cluster.places import (
    Fault,
    Site,
    drive,
    drive_forked,
    kill_and_resume,
    kill_driver,
    kill_worker,
    pause_worker,
)

FAULTS: dict[tuple[str, str], Fault] = {
    ("processes", "worker killed"): kill_worker,
    ("processes", "worker stopped for 4 s"): pause_worker,
    ("ray", "driver killed, then resumed"): kill_driver,
}
FAILED = {"right_decision": 0, "lost": 0, "trained_twice": 0, "begun_again": 0}


@dataclass(frozen=True, slots=True)
class Work:
    """A selection over sleeping workers, and where its run without a fault is."""

    reference: Path

    def make_reference(self) -> None:
        drive(Site("processes", self.reference), lambda: None, 0)

    def run(self, site: Site, fault: Fault, num_outcomes: int) -> None:
        if fault is kill_driver:
            killed, resumed = kill_and_resume(site, num_outcomes)
            require(killed == -signal.SIGKILL, "the driver was not killed")
            require(resumed == 0, "the resumed driver failed")
        else:
            drive(site, lambda: strike(site, fault), num_outcomes)
            require(site.is_hit, "it ended before the fault")


class TryError(Exception):
    """A try that did not come to its end."""


def strike(site: Site, fault: Fault) -> None:
    fault(site)
    site.is_hit = True


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise TryError(otherwise)


def read_outcome(folder: Path) -> tuple[dict[str, Any], Counter[str], Counter[str]]:
    """Return the decision without its measured values, and how often each trial finished and started."""
    records = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    decision = json.loads((folder / "decision.json").read_text())
    for measured in ("next_run", "next_runs"):  # they say what the next run would take
        decision.pop(measured)
    finished = Counter(record["trial_id"] for record in records if record["type"] == "trial_finished")
    return decision, finished, Counter(record["trial_id"] for record in records if record["type"] == "trial_started")


def judge_run(folder: Path, reference: Path) -> dict[str, Any]:
    decision, finished, started = read_outcome(folder)
    right, expected, _ = read_outcome(reference)
    return {
        "right_decision": int(decision == right),
        "lost": len(set(expected) - set(finished)),
        "trained_twice": sum(count - 1 for count in finished.values()),
        "begun_again": sum(count - 1 for count in started.values()),
    }


def try_fault(work: Work, site: Site, fault: Fault, num_outcomes: int) -> dict[str, Any]:
    begun = time.monotonic()
    try:
        work.run(site, fault, num_outcomes)
        result = judge_run(site.folder, work.reference)
    except (RightrankError, TryError, subprocess.TimeoutExpired) as error:
        result = {**FAILED, "error": str(error), "notices": site.notices}
    return {"after": num_outcomes, "seconds": round(time.monotonic() - begun, 1), **result}


def main() -> None:
    """Drive the selection that is named on the command line twice; the first drive kills itself."""
    executor, folder, num_outcomes, *address = sys.argv[1:]
    site = Site(executor, Path(folder), address=address[0] if address else None)
    print(json.dumps([drive_forked(site, int(num_outcomes)), drive_forked(site, 0)]))


if __name__ == "__main__":
    main()
