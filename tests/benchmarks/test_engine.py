"""Run the engine's benchmarks in a short form on a tiny model, and check what must hold at any size."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.engine import certified, compare

from rightrank.schema.events import Listener
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.training.loop import run_trial
from rightrank.training.trial import TrialFolders
from tests import helpers
from tests.tiny import build_small_settings

pytestmark = pytest.mark.trains


@pytest.fixture(autouse=True)
def _trainers_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.full
def test_every_contender_trains_and_is_compared(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    words = [model_folder, completion_file, "--job", "tail", "--layers", "1,2", "--steps", 2, "--max-eval-examples", 4]
    words += ["--rounds", 1, "--work", tmp_path, "--out", tmp_path / "tail.json"]
    result = compare.measure(compare.parse_arguments([str(word) for word in words]))
    (row,) = result["rounds"]
    assert {name.split()[0] for name in row} == {"Trainer", "ours"}
    assert row["ours float32"]["held_out"] == pytest.approx(row["ours float32 pack of 8"]["held_out"], rel=1e-4)
    assert set(result["speedup"]["ours float32"]) == set(row) - {"ours float32"}
    assert (tmp_path / "tail.json").exists()


def test_an_arm_that_differs_is_reported(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    runtime = helpers.make_runtime(model_folder, completion_file, build_small_settings(max_steps=3), tmp_path / "cache")
    arm = Arm(rank=2, learning_rate=1e-2, lora_alpha=32.0, seed=0, steps=3)
    folders = TrialFolders(tmp_path / "c", tmp_path / "adapter")
    trial = run_trial(runtime, Trial(trial_id="t", arm=arm), None, folders, Listener())
    assert isinstance(trial, TrialFinished)
    changed_trial = trial.model_copy(update={"train_losses": [*trial.train_losses[:2], trial.train_losses[2] * 1.01]})
    certificate = certified.certify(runtime, changed_trial, folders.adapter, tmp_path / "scratch", Listener(), None)
    assert certificate.passed is False
    assert certificate.loss_difference == pytest.approx(0.01, rel=1e-3)
    assert "NOT the same" in certificate.format_sentence()
