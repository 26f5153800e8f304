"""`select --certify`: one arm again alone, the comparison in journal and report."""

from __future__ import annotations

from pathlib import Path

import pytest

from rightrank.api.selecting import select_rank
from rightrank.hooks.certificate import certify
from rightrank.runs.journal import Journal
from rightrank.schema.events import Certified, Listener
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.train.loop import run_trial
from rightrank.train.trial import TrialFolders
from tests.helpers import make_runtime
from tests.tiny import small_settings


def certified(run: Path) -> Certified:
    (found,) = [record for record in Journal(run / "journal.jsonl").read() if isinstance(record, Certified)]
    return found


def test_a_multi_lora_selection_certifies_an_arm(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    settings = small_settings(adapters_per_pass=2, max_steps=4)
    select_rank(str(model_folder), completion_file, tmp_path / "run", settings=settings)
    assert "certified" not in (tmp_path / "run" / "journal.jsonl").read_text()
    # A finished run can be certified afterwards: it is the same run.
    select_rank(
        str(model_folder), completion_file, tmp_path / "run", settings=settings.model_copy(update={"certify": True})
    )
    certificate = certified(tmp_path / "run")
    assert certificate.passed is True
    assert certificate.adapters_per_pass == 2
    assert certificate.steps == 4
    assert max(certificate.loss_difference, certificate.adapter_difference) < 1e-3
    assert certificate.sentence().startswith(
        f"Rank {certificate.rank} was trained with 2 adapters per pass and again alone: the same."
    )
    assert (
        "Certificate: multi-LoRA training agrees with training alone" in (tmp_path / "run" / "report.html").read_text()
    )


def test_an_arm_that_differs_is_reported(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    runtime = make_runtime(model_folder, completion_file, small_settings(max_steps=3), tmp_path / "cache")
    arm = Arm(rank=2, learning_rate=1e-2, lora_alpha=32.0, seed=0, steps=3)
    folders = TrialFolders(tmp_path / "c", tmp_path / "adapter")
    trial = run_trial(runtime, Trial(trial_id="t", arm=arm), None, folders, Listener())
    assert isinstance(trial, TrialFinished)
    other = trial.model_copy(update={"train_losses": [*trial.train_losses[:2], trial.train_losses[2] * 1.01]})
    certificate = certify(runtime, other, folders.adapter, tmp_path / "scratch", Listener(), None)
    assert certificate.passed is False
    assert certificate.loss_difference == pytest.approx(0.01, rel=1e-3)
    assert "NOT the same" in certificate.sentence()


def test_bfloat16_is_held_against_the_difference_of_seeds(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    settings = small_settings(adapters_per_pass=4, max_steps=6, dtype="bfloat16", certify=True, seeds=(0, 1))
    select_rank(str(model_folder), completion_file, tmp_path / "run", settings=settings)
    certificate = certified(tmp_path / "run")
    assert not certificate.exact
    assert certificate.seed_difference is not None
    assert certificate.value_difference <= 0.1 * certificate.seed_difference
    assert certificate.passed is True
