"""A selection with guard data: from the option to the report, the card and the exports."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
from pathlib import Path

import pytest

from rightrank.data.splits import load_data
from rightrank.runs.journal import Journal
from rightrank.schema.events import AdapterRecorded, GuardEvaluated
from rightrank.schema.trials import TrialFinished
from tests.commands import SMALL, run
from tests.tiny import small_settings, write_jsonl

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def guard_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, which the task never has: learning its words makes them less likely."""
    generator = random.Random(0)
    rows = [{"text": "".join(generator.choices("0123456789", k=20))} for _ in range(30)]
    return write_jsonl(tmp_path_factory.mktemp("guard") / "guard.jsonl", rows)


@pytest.fixture(scope="module")
def finished(
    model_folder: Path, completion_file: Path, guard_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    from rightrank import select_rank

    out = tmp_path_factory.mktemp("guarded") / "run"
    settings = small_settings(device="cpu", guard=[str(guard_file)], guard_margin=5.0)
    select_rank(str(model_folder), completion_file, out, settings=settings)
    return out


def test_every_adapter_is_measured_and_the_answer_carries_the_guard(finished: Path, guard_file: Path) -> None:
    journal = Journal(finished / "journal.jsonl").read()
    trials = {one.trial_id for one in journal if isinstance(one, TrialFinished) and one.stop_at is None}
    measured = [one for one in journal if isinstance(one, GuardEvaluated)]
    assert {one.trial_id for one in measured} == trials
    assert len(measured) == len(trials)
    assert {len(one.item_losses) for one in measured} == {12}
    decision = json.loads((finished / "decision.json").read_text())
    guard = decision["guard"]
    assert guard["holds"] is True
    assert guard["files"][0] | {"examples": 12} == guard["files"][0]
    assert guard["files"][0]["file"] == str(guard_file)
    assert (guard["difference"], guard["difference_high"]) == (
        guard["files"][0]["difference"],
        guard["files"][0]["difference_high"],
    )
    chosen = [one for one in journal if isinstance(one, AdapterRecorded)][-1].answer.trial_id
    assert chosen in trials
    report = html.unescape((finished / "report.html").read_text())
    assert guard["sentence"] in report
    assert guard["sentence"] in (finished / "adapter" / "README.md").read_text()


def test_training_rows_in_a_guard_file_are_left_out_and_said(
    model_folder: Path, completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter lowers their loss, whatever it forgets."""
    arguments = ["select", str(model_folder), str(completion_file), "--goal", "adapter", *SMALL]
    status, _, err = run([*arguments, "--out", str(tmp_path / "run"), "--guard", str(completion_file)], capsys)
    assert status == 0
    assert re.search(
        r"guard .*: \d+ of \d+ rows are training examples, whose loss an adapter lowers; they are left out", err
    )
    trained_on = [dict(one.content) for one in load_data(completion_file, small_settings()).examples["train"]]
    rows = [row for row in map(json.loads, completion_file.read_text().splitlines()) if row in trained_on]
    seen = write_jsonl(tmp_path / "seen.jsonl", rows)
    status, _, err = run([*arguments, "--out", str(tmp_path / "other"), "--guard", str(seen)], capsys)
    assert status == 2
    assert "give rows that it does not train on" in err


def test_exports_carry_the_sentence(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(["export", str(finished), "--to", "trl", "--out", str(tmp_path / "trl"), "--json"], capsys)
    assert status == 0
    text = "".join(path.read_text() for path in (tmp_path / "trl").rglob("*") if path.suffix in (".py", ".yaml", ".md"))
    assert "Guard: kept; the loss on guard.jsonl" in text + out


def test_a_tighter_guard_on_a_finished_run_trains_nothing(
    finished: Path,
    model_folder: Path,
    completion_file: Path,
    guard_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    before = sum(isinstance(one, TrialFinished) for one in Journal(again / "journal.jsonl").read())
    given = [
        "select",
        str(model_folder),
        str(completion_file),
        "--out",
        str(again),
        *SMALL,
        "--quiet",
    ]
    status, out, err = run([*given, "--guard", str(guard_file), "--set", "guard_margin=1e-9", "--json"], capsys)
    assert status == 0, err
    found = json.loads(out)["guard"]
    assert found["margin"] == 1e-9
    assert (found["holds"], found["difference_high"] > 1e-9) == (False, True)
    status, text, _ = run([*given, "--guard", str(guard_file), "--set", "guard_margin=1e-9"], capsys)
    assert status == 0
    assert found["sentence"] in text
    assert sum(isinstance(one, TrialFinished) for one in Journal(again / "journal.jsonl").read()) == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": text, "label": label} for text in "abc" for label in "xy"],
            "the data has the form 'classification', and this run trains on tokens",
        ),
        ([{"other": 1}] * 5, "other"),
        (None, "guard"),
    ],
)
def test_a_guard_that_cannot_be_scored_is_refused_before_the_start(
    rows: list[dict[str, object]] | None,
    message: str,
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "bad.jsonl"
    if rows is not None:
        write_jsonl(file, rows)
    out = tmp_path / "run"
    given = [
        "select",
        str(model_folder),
        str(completion_file),
        "--out",
        str(out),
        *SMALL,
        "--guard",
        str(file),
        "--quiet",
    ]
    status, shown, err = run(given, capsys)
    assert (status, shown) == (2, "")
    assert str(file) in err
    assert message in err
    assert err.count("\n") == 1
    assert not (out / "journal.jsonl").exists()
