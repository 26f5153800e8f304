"""One trial of one arm on a runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rightrank.schema.events import Event, StepDone
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.train.loop import run_trial
from rightrank.train.trial import TrialFolders
from tests.watch import Watch


def train_ours(runtime: Any, arm: Arm, tmp_path: Path) -> tuple[TrialFinished, list[float], Path]:
    losses: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, StepDone):
            losses.append(event.loss)

    folders = TrialFolders(tmp_path / "checkpoint.safetensors", tmp_path / "adapter")
    trial = Trial(trial_id="t", arm=arm)
    outcome = run_trial(runtime, trial, None, folders, Watch(on_event=note))
    assert isinstance(outcome, TrialFinished)
    return outcome, losses, folders.adapter
