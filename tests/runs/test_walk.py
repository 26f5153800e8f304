"""Selections that walk over learning rates, cut and resumed, and the groups of the rows that they are compared on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rightrank import select_rank
from rightrank.api.folders import status
from rightrank.runs.folder import Journal
from rightrank.schema.trials import TrialFinished
from rightrank.search.rates import RATES
from tests.tiny import build_small_settings, generate_sentences, write_jsonl

pytestmark = pytest.mark.trains

WALK: dict[str, Any] = {"goal": "adapter", "strategy": "bracket", "learning_rates": None, "max_steps": 12}


def read_trials(run: Path) -> list[TrialFinished]:
    return [record for record in Journal(run / "journal.jsonl").read() if isinstance(record, TrialFinished)]


@pytest.fixture(scope="module")
def walked(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("walk") / "run"
    select_rank(str(model_folder), completion_file, run, settings=build_small_settings(**WALK))
    return run


def test_a_selection_walks_until_the_loss_rises_and_finishes_the_best_rate(walked: Path) -> None:
    trials = read_trials(walked)
    quarters = {trial.learning_rate: trial.use_mean_losses().metrics["loss"] for trial in trials if trial.stop_at}
    assert list(quarters)[:2] == [1e-3, 3e-3]
    best = min(quarters, key=lambda rate: quarters[rate])
    index = RATES.index(best)
    assert {*RATES[max(0, index - 1) : index + 2]} <= {*quarters}
    (whole,) = [trial for trial in trials if trial.is_direct and trial.rank and not trial.stop_at]
    assert whole.learning_rate == best
    document = json.loads((walked / "decision.json").read_text())
    assert document["learning_rate"] == best
    assert document["cost"]["trainings"] == pytest.approx(1 + (len(quarters) - 1) / 4)
    assert not [run for run in status(walked).answers.next_runs if run.action == "rates"]  # no edge was reached


def test_a_walk_that_is_cut_anywhere_resumes_to_the_same_adapter(
    walked: Path, model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    lines = (walked / "journal.jsonl").read_bytes().splitlines(keepends=True)
    ends = [number for number, line in enumerate(lines, 1) if b'"trial_id"' in line and b'"stop_at":null' not in line]
    assert len(ends) >= 3
    for end in ends:
        run = tmp_path / str(end) / "run"
        shutil.copytree(walked, run)
        (run / "journal.jsonl").write_bytes(b"".join(lines[:end]))
        shutil.rmtree(run / "adapter")
        select_rank(str(model_folder), completion_file, run, settings=build_small_settings(**WALK))
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (run / "adapter" / name).read_bytes() == (walked / "adapter" / name).read_bytes()


def test_every_score_of_grouped_rows_has_its_group(model_folder: Path, tmp_path: Path) -> None:
    """At a quarter too, where the learning rates are compared."""
    rows = [
        {"prompt": f"{text} : ", "completion": " ".join(text.split()[:3]), "document": f"{index // 4}"}
        for index, text in enumerate(generate_sentences(240, seed=3))
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = build_small_settings(
        goal="adapter", strategy="bracket", learning_rates=(3e-3, 1e-2), columns=("group=document",)
    )
    select_rank(str(model_folder), data, tmp_path / "run", settings=settings)
    trials = read_trials(tmp_path / "run")
    assert {trial.stop_at is None for trial in trials} == {True, False}
    for trial in trials:
        assert trial.example_groups is not None
        assert len(trial.example_groups) == len(trial.example_losses)
        assert 1 < len(set(trial.example_groups)) < len(trial.example_groups)
