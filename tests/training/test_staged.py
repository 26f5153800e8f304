"""Trainings in stages, and adapters truncated to a lower rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rightrank.schema.errors import InterruptedRun
from rightrank.schema.events import Listener
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.training.loop import TrialFolders
from rightrank.training.optimizer import load_checkpoint, save_checkpoint
from tests.helpers import make_runtime, run_trial
from tests.tiny import build_small_settings
from tests.watch import Watch

ARM = Arm(rank=4, learning_rate=1e-2, lora_alpha=32.0, seed=0, steps=8)


def run(runtime: object, name: str, arm: Arm, tmp: Path, **parents: Path) -> TrialFinished:
    folders = TrialFolders(tmp / f"{name}.safetensors", tmp / name, **parents)
    outcome = run_trial(runtime, Trial(trial_id=name, arm=arm), None, folders, Listener())  # type: ignore[arg-type]
    assert isinstance(outcome, TrialFinished)
    return outcome


@pytest.fixture
def runtime(model_folder: Path, completion_file: Path, tmp_path: Path) -> object:
    return make_runtime(model_folder, completion_file, build_small_settings(num_evaluations=4), tmp_path / "cache")


def test_stages_end_as_the_whole_does(runtime: object, tmp_path: Path) -> None:
    full_training = run(runtime, "whole", ARM, tmp_path)
    first = run(runtime, "first", ARM.model_copy(update={"stop_at": 3}), tmp_path)
    assert not (tmp_path / "first").exists()  # a part of a training leaves no adapter
    second_arm = ARM.model_copy(update={"continue_from": "first"})
    second = run(runtime, "second", second_arm, tmp_path, continue_from=tmp_path / "first.safetensors")
    assert second.value == pytest.approx(full_training.value, rel=1e-6)
    assert [point.step for point in second.points] == [point.step for point in full_training.points]
    assert first.value != pytest.approx(full_training.value, rel=1e-4)


def test_a_stopped_training_also_scores_the_mean_of_its_factors(runtime: object, tmp_path: Path) -> None:
    stopped = {
        step: run(runtime, f"to{step}", ARM.model_copy(update={"stop_at": step}), tmp_path) for step in (4, 5, 6)
    }
    checkpoints = {step: load_checkpoint(tmp_path / f"to{step}.safetensors") for step in stopped}
    tensors = {step: checkpoint[0] for step, checkpoint in checkpoints.items() if checkpoint is not None}
    state = checkpoints[6][1] if checkpoints[6] is not None else {}
    means = {
        name: torch.stack([tensors[step][name] for step in (5, 6)]).mean(0)  # a quarter of six steps
        for name in tensors[6]
        if name.startswith("parameter.")
    }
    arm, seen = ARM.model_copy(update={"stop_at": 6}), list[object]()
    save_checkpoint(tmp_path / "mean.safetensors", tensors[6] | means, state | {"trial_id": "mean"})
    by_hand = run(runtime, "mean", arm, tmp_path)
    assert stopped[6].mean_losses == pytest.approx(by_hand.example_losses, rel=1e-5)
    assert stopped[6].mean_losses != pytest.approx(stopped[6].example_losses, rel=1e-3)
    with pytest.raises(InterruptedRun):  # a training that was stopped in between ends with the same mean
        run_trial(
            runtime,  # type: ignore[arg-type]
            Trial(trial_id="resumed", arm=arm),
            None,
            TrialFolders(tmp_path / "resumed.safetensors", tmp_path / "resumed"),
            Watch(lambda event: seen.append(event), should_stop=lambda: len(seen) >= 5),
        )
    assert run(runtime, "resumed", arm, tmp_path).mean_losses == stopped[6].mean_losses


def test_a_truncation_that_keeps_all_keeps_the_loss(runtime: object, tmp_path: Path) -> None:
    full_training = run(runtime, "whole", ARM, tmp_path)
    cut = {
        rank: run(
            runtime,
            f"cut{rank}",
            ARM.model_copy(update={"rank": rank, "steps": 0, "truncate_from": "whole"}),
            tmp_path,
            truncate_from=tmp_path / "whole",
        )
        for rank in (4, 1)
    }
    assert cut[4].value == pytest.approx(full_training.value, abs=1e-5)
    assert cut[1].value != pytest.approx(full_training.value, abs=1e-5)
    assert cut[1].trainable_parameters < cut[4].trainable_parameters
