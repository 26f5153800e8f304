"""One trial of one arm on a bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rightrank.engine.arm_training import TrialFolders, Watcher
from rightrank.engine.training_loop import run_trial
from rightrank.records import Arm, StepDone, Trial, TrialFinished


def train_ours(runtime: Any, arm: Arm, tmp_path: Path) -> tuple[TrialFinished, list[float], Path]:
    losses: list[float] = []

    def note(event: StepDone) -> None:
        losses.append(event.loss)

    folders = TrialFolders(tmp_path / "checkpoint.safetensors", tmp_path / "adapter")
    trial = Trial(trial_id="t", arm=arm)
    outcome = run_trial(runtime, trial, None, folders, Watcher(on_step=note))
    assert isinstance(outcome, TrialFinished)
    return outcome, losses, folders.adapter
