"""Test that `select --dry-run` and `select` describe the same run."""

from __future__ import annotations

from pathlib import Path

from rightrank.api.selecting import preflight, select_rank
from rightrank.runs.journal import Journal
from rightrank.schema.events import RunStarted, SelectionPlanned
from rightrank.schema.trials import TrialFinished
from tests.watch import Watch

SMALL = {"learning_rates": [1e-2], "batch_size": 4, "max_eval_examples": 12, "num_evaluations": 2, "device": "cpu"}


def test_dry_run_and_selection_agree(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    """Omit ranks, steps and length, so that preflight and selection must choose the same values."""
    announced: list[SelectionPlanned] = []
    watching = Watch(lambda event: announced.append(event) if isinstance(event, SelectionPlanned) else None)
    selected = select_rank(str(model_folder), completion_file, tmp_path / "run", callbacks=[watching], **SMALL)
    first_preflight = preflight(str(model_folder), completion_file, **SMALL)

    records = Journal(tmp_path / "run" / "journal.jsonl").read()
    started = next(record for record in records if isinstance(record, RunStarted))
    finished = [record for record in records if isinstance(record, TrialFinished) and record.rank > 0]
    assert started.settings["ranks"] == [row.rank for row in first_preflight.ranks]
    assert announced[0].steps == first_preflight.cost.steps
    assert first_preflight.longest <= started.settings["seq_len"]
    assert announced[0].expected_trainings == first_preflight.cost.trainings
    peaks = {row.rank: row.peak_bytes for row in first_preflight.ranks}
    direct = [trial for trial in finished if trial.truncate_from is None and len(trial.pass_ranks or []) < 2]
    assert direct
    assert all(trial.predicted_peak_bytes == peaks[trial.rank] for trial in direct)
    assert selected.cost["trainings"] > 0
