"""Faults of a run over workers, and whether it still comes to the decision of a run without a fault.

The loop, the journal, the pool and the workers' processes or Ray actors are the real ones; workers sleep where they would train.
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
    Place,
    drive,
    drive_forked,
    kill_driver,
    kill_worker,
    killed_and_resumed,
    slow_worker,
)

FAULTS: dict[tuple[str, str], Fault] = {
    ("processes", "worker killed"): kill_worker,
    ("processes", "worker stopped for 4 s"): slow_worker,
    ("ray", "driver killed, then resumed"): kill_driver,
}
FAILED = {"right_decision": 0, "lost": 0, "trained_twice": 0, "begun_again": 0}


@dataclass(frozen=True, slots=True)
class Work:
    """A selection over sleeping workers, and where its run without a fault is."""

    reference: Path

    def make_reference(self) -> None:
        drive(Place("processes", self.reference), lambda: None, 0)

    def run(self, place: Place, fault: Fault, after: int) -> None:
        if fault is kill_driver:
            killed, resumed = killed_and_resumed(place, after)
            require(killed == -signal.SIGKILL, "the driver was not killed")
            require(resumed == 0, "the resumed driver failed")
        else:
            drive(place, lambda: hit(place, fault), after)
            require(place.is_hit, "it ended before the fault")


class TryError(Exception):
    """A try that did not come to its end."""


def hit(place: Place, fault: Fault) -> None:
    fault(place)
    place.is_hit = True


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise TryError(otherwise)


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


def main() -> None:
    """Drive the selection that is named on the command line twice; the first drive kills itself."""
    executor, folder, after, *address = sys.argv[1:]
    place = Place(executor, Path(folder), address=address[0] if address else None)
    print(json.dumps([drive_forked(place, int(after)), drive_forked(place, 0)]))


if __name__ == "__main__":
    main()
