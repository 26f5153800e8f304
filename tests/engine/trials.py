"""One trial of one arm on a runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rightrank.engine.training_loop import run_trial
from rightrank.engine.trial_start import TrialFolders
from rightrank.records import Arm, RunEvent, StepDone, Trial, TrialFinished
from rightrank.records.observer import Observer


def train_ours(runtime: Any, arm: Arm, tmp_path: Path) -> tuple[TrialFinished, list[float], Path]:
    losses: list[float] = []

    def note(event: RunEvent) -> None:
        if isinstance(event, StepDone):
            losses.append(event.loss)

    folders = TrialFolders(tmp_path / "checkpoint.safetensors", tmp_path / "adapter")
    trial = Trial(trial_id="t", arm=arm)
    outcome = run_trial(runtime, trial, None, folders, Observer(on_event=note))
    assert isinstance(outcome, TrialFinished)
    return outcome, losses, folders.adapter
