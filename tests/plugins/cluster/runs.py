"""What two runs are compared by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rightrank.runs.journal import Journal
from rightrank.schema.trials import TrialFinished

STEPS: dict[str, Any] = {"max_steps": 12, "ranks": (1, 4), "checkpoint_seconds": 0.01}


def decision_of(run: Path) -> dict[str, Any]:
    """All but what a next run would take, which is measured."""
    decision = dict(json.loads((run / "decision.json").read_text()))
    return {name: value for name, value in decision.items() if name not in ("next_run", "next_runs")}


def values_of(run: Path) -> dict[str, float]:
    records = Journal(run / "journal.jsonl").read()
    finished = [record for record in records if isinstance(record, TrialFinished)]
    assert len({trial.trial_id for trial in finished}) == len(finished)  # none counted twice
    return {trial.trial_id: trial.value for trial in finished}
