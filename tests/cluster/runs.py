"""Make trials and runs for workers, and read what they gave."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rightrank import select_rank
from rightrank.runs.folder import Journal
from rightrank.schema.trials import Arm, Trial, TrialFinished
from tests.tiny import build_small_settings

STEPS: dict[str, Any] = {"max_steps": 12, "ranks": (1, 4)}


def make_trials(count: int) -> list[Trial]:
    arms = [Arm(rank=1 + n, learning_rate=1e-3, lora_alpha=32.0, seed=0, steps=10 + n) for n in range(count)]
    return [Trial(trial_id=f"trial-{n:03}", arm=arm) for n, arm in enumerate(arms)]


def make_result(trial: Trial) -> TrialFinished:
    """Return the same result for the same trial, on any worker."""
    value = 1.0 + 1.0 / (1 + trial.arm.rank) + trial.arm.learning_rate
    return TrialFinished(
        trial_id=trial.trial_id,
        **trial.arm.model_dump(),
        value=value,
        metrics={"loss": value},
        example_losses=[value] * 4,
        example_tokens=[1] * 4,
        trainable_parameters=trial.arm.rank,
        train_seconds=1.0,
    )


def read_decision(run: Path) -> dict[str, Any]:
    """Return the decision without the cost of the next run, which is measured."""
    decision = dict(json.loads((run / "decision.json").read_text()))
    return {name: value for name, value in decision.items() if name not in ("next_run", "next_runs")}


def read_adapters(run: Path) -> dict[str, tuple[float, bytes]]:
    """Return the value and the weights of each finished trial."""
    records = Journal(run / "journal.jsonl").read()
    finished = [record for record in records if isinstance(record, TrialFinished)]
    assert len({trial.trial_id for trial in finished}) == len(finished)  # none counted twice
    files = {trial.trial_id: run / "trials" / trial.trial_id / "adapter_model.safetensors" for trial in finished}
    return {
        trial.trial_id: (trial.value, files[trial.trial_id].read_bytes() if trial.rank else b"") for trial in finished
    }


def main() -> None:
    """Run a selection in a process that a test can kill: `python -m tests.cluster.runs MODEL DATA OUT [ADDRESS]`."""
    model, data, out, *address = sys.argv[1:]
    settings = build_small_settings(**STEPS, workers=2, ray=next(iter(address), None))
    select_rank(model, data, out, settings=settings)


if __name__ == "__main__":
    main()
