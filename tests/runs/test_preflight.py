"""Test `select --dry-run`: it describes the selection, its power and the same run as `select`, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rightrank import preflight, select_rank
from rightrank.decision.adapter import Criterion
from rightrank.runs.folder import Journal
from rightrank.runs.preflight import estimate_resolution
from rightrank.schema.events import RunStarted, SelectionPlanned
from tests.commands import SMALL, run
from tests.watch import Watch


def list_files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_dry_run_describes_the_selection_and_writes_nothing(
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    files_before = list_files(tmp_path), list_files(model_folder), list_files(completion_file.parent)
    arguments = ["select", str(model_folder), str(completion_file), "--dry-run", "--json", *SMALL]
    status, out, _ = run(arguments, capsys)
    assert status == 0
    result = json.loads(out)
    assert (list_files(tmp_path), list_files(model_folder), list_files(completion_file.parent)) == files_before
    assert result["splits"]["validation"]["examples"] == 12
    assert result["splits"]["train"]["label_tokens"] > 0
    assert [row["rank"] for row in result["ranks"]] == [1, 4]
    assert all(row["peak_bytes"] > 0 for row in result["ranks"])
    assert result["cost"]["trainings"] >= 2.0
    assert result["cost"]["strategy"] == "grid"
    assert result["margin"] is None  # a share of a gain that is not known yet


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give MODEL and DATA, or neither to continue the run in --out"),
        (["model", "--out", "run"], "give MODEL and DATA, or neither"),
        (["model", "data.jsonl", "--dry-run", "--strategy", "gird"], "unknown strategy 'gird'"),
    ],
)
def test_bad_use_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(["select", *arguments], capsys)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


SMALL_SETTINGS = {
    "learning_rates": [1e-2],
    "batch_size": 4,
    "max_eval_examples": 12,
    "num_evaluations": 2,
    "device": "cpu",
}


def test_dry_run_and_selection_agree(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    """Omit ranks, steps and length, so that preflight and selection must choose the same values."""
    announced: list[SelectionPlanned] = []
    watching = Watch(lambda event: announced.append(event) if isinstance(event, SelectionPlanned) else None)
    selected = select_rank(str(model_folder), completion_file, tmp_path / "run", callbacks=[watching], **SMALL_SETTINGS)
    first_preflight = preflight(str(model_folder), completion_file, **SMALL_SETTINGS)

    records = Journal(tmp_path / "run" / "journal.jsonl").read()
    started = next(record for record in records if isinstance(record, RunStarted))
    assert started.settings["ranks"] == [row.rank for row in first_preflight.ranks]
    assert announced[0].steps == first_preflight.cost.steps
    assert first_preflight.longest <= started.settings["seq_len"]
    assert announced[0].expected_trainings == first_preflight.cost.trainings
    assert selected.cost["trainings"] > 0


def test_examples_that_tell_the_margin_have_a_resolution_of_it() -> None:
    resolution, needed = estimate_resolution(Criterion("loss", False, None), 30, 0.005)
    assert needed is not None
    assert resolution == pytest.approx(1.645 * 0.08 / 30**0.5, rel=1e-3)
    assert estimate_resolution(Criterion("loss", False, None), needed, 0.005)[0] == pytest.approx(0.005, rel=1e-3)
    assert estimate_resolution(Criterion("value", True, None), 30, 0.005) == (None, None)
    assert estimate_resolution(Criterion("loss", False, None), 30, 1e-200) == (resolution, None)
