"""Make trials for the workers of a test, and read what two runs are compared by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rightrank.runs.journal import Journal
from rightrank.schema.trials import Arm, Trial, TrialFinished

STEPS: dict[str, Any] = {"max_steps": 12, "ranks": (1, 4), "checkpoint_seconds": 0.01}


def make_trials(count: int) -> list[Trial]:
    arms = [Arm(rank=1 + n, learning_rate=1e-3, lora_alpha=32.0, seed=0, steps=10 + n) for n in range(count)]
    return [Trial(trial_id=f"trial-{n:03}", arm=arm) for n, arm in enumerate(arms)]


def read_decision(run: Path) -> dict[str, Any]:
    """Return the decision without the cost of the next run, which is measured."""
    decision = dict(json.loads((run / "decision.json").read_text()))
    return {name: value for name, value in decision.items() if name not in ("next_run", "next_runs")}


def read_values(run: Path) -> dict[str, float]:
    records = Journal(run / "journal.jsonl").read()
    finished = [record for record in records if isinstance(record, TrialFinished)]
    assert len({trial.trial_id for trial in finished}) == len(finished)  # none counted twice
    return {trial.trial_id: trial.value for trial in finished}
