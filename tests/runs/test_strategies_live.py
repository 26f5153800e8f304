"""Test strategies on real trainings of a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from rightrank.api.selecting import select_rank
from rightrank.runs.journal import Journal
from rightrank.schema.errors import InterruptedRun
from rightrank.schema.events import Event
from rightrank.schema.trials import TrialFinished
from tests.tiny import build_small_settings
from tests.watch import Watch

STAGED = {"ranks": (1, 2, 4), "learning_rates": (3e-3, 1e-2, 3e-2), "num_evaluations": 4, "margin": 0.05}


def read_finished(run: Path) -> list[TrialFinished]:
    return [record for record in Journal(run / "journal.jsonl").read() if isinstance(record, TrialFinished)]


@pytest.mark.parametrize("strategy", ["bracket"])
def test_a_strategy_trains_in_stages_and_resumes(
    model_folder: Path, completion_file: Path, tmp_path: Path, strategy: str
) -> None:
    settings = build_small_settings(strategy=strategy, **STAGED)
    notices: list[str] = []
    uninterrupted = select_rank(
        str(model_folder),
        completion_file,
        tmp_path / "whole",
        settings=settings,
        callbacks=[Watch(notice=notices.append)],
    )
    assert any(f"strategy {strategy}: about" in notice for notice in notices)
    assert any(trial.stop_at for trial in read_finished(tmp_path / "whole"))
    assert any(trial.truncate_from for trial in read_finished(tmp_path / "whole"))
    assert (uninterrupted.adapter.path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "whole" / "checkpoints").exists()

    ended = 0

    def count(event: Event) -> None:
        nonlocal ended
        ended += isinstance(event, TrialFinished)

    watching = Watch(on_event=count, should_stop=lambda: ended >= 4)
    with pytest.raises(InterruptedRun):
        select_rank(str(model_folder), completion_file, tmp_path / "cut", settings=settings, callbacks=[watching])
    resumed = select_rank(str(model_folder), completion_file, tmp_path / "cut", settings=settings)
    assert resumed.decision == uninterrupted.decision
    values = [{trial.trial_id: trial.value for trial in read_finished(tmp_path / name)} for name in ("whole", "cut")]
    assert values[0] == values[1]


def test_a_budget_holds_on_real_trainings(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    settings = build_small_settings(strategy="bracket", budget_trainings=3.5, **STAGED)
    select_rank(str(model_folder), completion_file, tmp_path / "run", settings=settings)
    trials = read_finished(tmp_path / "run")
    stages = {trial.trial_id: trial.stop_at or 0 for trial in trials}
    steps = sum((trial.stop_at or trial.steps) - stages.get(trial.continue_from or "", 0) for trial in trials)
    assert steps <= 3.5 * 8
