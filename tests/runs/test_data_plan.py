"""`plan MODEL DATA` and `select MODEL DATA` describe the same run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rightrank.api.selecting import preflight, select_rank
from rightrank.plugins.plan import plan_selection
from rightrank.runs.journal import Journal
from rightrank.schema.events import RunStarted, SelectionPlanned
from rightrank.schema.trials import TrialFinished
from tests.commands import run
from tests.watch import Watch

SMALL = {"learning_rates": [1e-2], "batch_size": 4, "eval_items": 12, "eval_points": 2, "samples": 0, "device": "cpu"}

SAME_NAMES = (
    *("batch_size", "target_modules", "modules_to_save", "lora_dropout", "dtype", "gradient_checkpointing"),
    *("strategy", "learning_rates", "seeds", "eval_items", "eval_points"),
)


def test_one_model_and_data_have_one_run(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    """Nothing is given for ranks, steps and length: plan, preflight and selection settle them alike."""
    announced: list[SelectionPlanned] = []
    watching = Watch(lambda event: announced.append(event) if isinstance(event, SelectionPlanned) else None)
    selected = select_rank(str(model_folder), completion_file, tmp_path / "run", callbacks=[watching], **SMALL)
    planned = plan_selection(str(model_folder), completion_file, **SMALL)
    before = preflight(str(model_folder), completion_file, **SMALL)

    records = Journal(tmp_path / "run" / "journal.jsonl").read()
    started = next(record for record in records if isinstance(record, RunStarted))
    finished = [record for record in records if isinstance(record, TrialFinished) and record.rank > 0]
    assert {name: planned.settings[name] for name in SAME_NAMES} == {n: started.settings[n] for n in SAME_NAMES}
    assert planned.settings["ranks"] == started.settings["ranks"] == [row.rank for row in before.ranks]
    assert planned.settings["max_steps"] == announced[0].steps == before.cost.steps
    assert planned.settings["seq_len"] == before.longest <= started.settings["seq_len"]
    assert planned.data == started.data
    assert planned.selection is not None
    assert planned.selection.expected.trainings == announced[0].expected_trainings == before.cost.trainings
    assert planned.selection.most.trainings == before.cost.trainings_at_most
    peaks = {row.rank: row.peak_bytes for row in planned.ranks}
    direct = [trial for trial in finished if trial.truncate_from is None and len(trial.pass_ranks or []) < 2]
    assert direct
    assert all(trial.predicted_peak_bytes == peaks[trial.rank] for trial in direct)
    assert selected.cost["trainings"] > 0


def test_the_command_takes_the_names_of_both(
    model_folder: Path, completion_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = ["--ranks", "1,4", "--max-steps", "8", "--batch-size", "4", "--device", "cpu", "--dtype", "fp32"]
    command = ["plan", str(model_folder), str(completion_file), *step]
    status, out, _ = run([*command, "--json"], capsys)
    found = json.loads(out)
    assert status == 0
    assert (found["settings"]["max_steps"], found["settings"]["packed"], found["settings"]["loss"]) == (
        8,
        True,
        "chunked",
    )
    assert found["ranks"][0]["select_peak_bytes"] is None  # the plan is of `select` already
    status, out, _ = run(command, capsys)
    assert status == 0
    assert "a step of `rightrank select`: 4 sequences" in out
    status, _, error = run([*command, "--loss", "full"], capsys)
    assert (status, error.count("\n")) == (2, 1)
    assert "leave out DATA or --loss" in error


def test_a_plan_without_data_shows_both_loops(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The column `in select` is the plan of the same step with the settings of `select`."""
    step = ["plan", str(model_folder), "--ranks", "1,4", "--seq-len", "20", "--batch-size", "4", "--json"]
    both = json.loads(run(step, capsys)[1])["ranks"]
    loop = ["--loss", "chunked", "--optim", "adamw_fused", "--set", "packed=true"]
    alone = json.loads(run([*step, *loop], capsys)[1])["ranks"]
    assert [row["select_peak_bytes"] for row in both] == [row["peak_bytes"] for row in alone]
    assert [row["select_needed_bytes"] for row in both] == [row["needed_bytes"] for row in alone]
    assert all(row["select_peak_bytes"] < row["peak_bytes"] for row in both)
