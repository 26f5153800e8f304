"""Test a selection on preference pairs, from rows to exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rightrank import Selected, select_rank
from rightrank.runs.folder import RunFolder
from rightrank.schema.trials import TrialFinished
from tests.tiny import build_small_settings, write_pairs

pytestmark = pytest.mark.trains
PAIR_METRICS = {"reward_accuracy", "reward_margin", "chosen_log_ratio"}


@pytest.fixture(scope="module")
def pair_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(scope="module")
def selected(model_folder: Path, pair_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Selected:
    """Run a bracket of two ranks, two adapters per pass, on the last layer."""
    settings = build_small_settings(
        strategy="bracket",
        layers_to_transform=(2,),
        max_steps=16,
        beta=0.5,
        metrics=("reward_accuracy",),
        adapters_per_pass=2,
    )
    return select_rank(str(model_folder), pair_file, tmp_path_factory.mktemp("run") / "run", settings=settings)


@pytest.fixture(scope="module")
def records(selected: Selected) -> list[Any]:
    return RunFolder(selected.run).journal.read()


def test_every_trial_has_the_metrics_of_pairs(selected: Selected, records: list[Any]) -> None:
    trials = [record for record in records if isinstance(record, TrialFinished)]
    assert all(trial.metrics.keys() >= PAIR_METRICS for trial in trials)
    for trial in trials:
        assert set(trial.example_tokens) == {1}
        assert {len(values) for values in trial.example_metrics.values()} == {len(trial.example_losses)}
        weighted_scores = trial.get_weighted_scores("reward_accuracy")
        assert sum(weighted_scores[0]) / len(weighted_scores[0]) == trial.metrics["reward_accuracy"]
    base = next(trial for trial in trials if trial.rank == 0)
    assert base.metrics["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert base.metrics["chosen_log_ratio"] == pytest.approx(0, abs=1e-4)
    assert base.metrics["reward_accuracy"] == 0.5
    assert min(trial.metrics["loss"] for trial in trials) < 0.6
    assert "kfac" in {trial.truncation for trial in trials}
