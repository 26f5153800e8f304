"""Run folders begun with a strategy that no longer exists: read, reported, decided and exported; not requested again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rightrank import strategies
from rightrank.api import select_rank
from rightrank.errors import SettingsError
from rightrank.io.journal import Journal
from rightrank.records import (
    AdapterRecorded,
    DecisionRecorded,
    JournalRecord,
    RunStarted,
    TestEvaluated,
    TrialFinished,
)
from rightrank.strategies.grid import Grid
from tests.commands import run, select_arguments
from tests.tiny import small_settings

REMOVED = ("ladder", "ascend", "descend")
SETTINGS = small_settings(max_steps=20, samples=1, margin=5.0)


@pytest.fixture(scope="module")
def grid_run(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid") / "run"
    select_rank(str(model_folder), completion_file, folder, settings=SETTINGS)
    return folder


def begun_with(grid_run: Path, strategy: str, folder: Path) -> Path:
    """The run as a version with `strategy` left it: without an answer to the first question.

    `descend` trained the top rank alone and compared its recovered truncations.
    """
    shutil.copytree(grid_run, folder)
    (folder / "decision.json").unlink()
    (folder / "report.html").unlink()
    records = Journal(folder / "journal.jsonl").read()
    (folder / "journal.jsonl").unlink()
    journal = Journal(folder / "journal.jsonl")
    if strategy == "descend":  # the top rank got the same steps
        top = next(one for one in records if isinstance(one, TrialFinished) and one.rank == 4)
        records.append(top.model_copy(update={"trial_id": "top-again", "steps": 0, "truncate_from": top.trial_id}))
        small = next(one for one in records if isinstance(one, TrialFinished) and one.truncate_from and one.rank == 1)
        decided = next(one for one in records if isinstance(one, DecisionRecorded))
        records.append(decided.model_copy(update={"adapter_trial_id": small.trial_id}))
        shutil.rmtree(folder / "adapter")
        shutil.copytree(folder / "trials" / small.trial_id, folder / "adapter")
    for record in records:
        if (kept := _as_before(record, strategy)) is not None:
            journal.append(kept)
    return folder


def _as_before(record: JournalRecord, strategy: str) -> JournalRecord | None:
    match record:
        case RunStarted():
            settings = {name: value for name, value in record.settings.items() if name != "goal"}
            return record.model_copy(update={"settings": {**settings, "strategy": strategy}})
        case AdapterRecorded() | TestEvaluated():
            return None
        case TrialFinished() if record.rank > 0:
            if strategy == "descend" and record.truncate_from is not None:
                return record.model_copy(update={"steps": 2, "learning_rate": 3e-3, "truncation": None})
            keeps = record.truncate_from is None and (strategy != "descend" or record.rank == 4)
            return record if keeps else None
        case _:
            return record


@pytest.mark.parametrize("strategy", REMOVED)
def test_it_is_shown_decided_and_exported(
    grid_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    folder = begun_with(grid_run, strategy, tmp_path / "run")
    decided = [one for one in Journal(folder / "journal.jsonl").read() if isinstance(one, DecisionRecorded)][-1]
    answers = {}
    for command in (["status"], ["report"], ["decide"], ["export", "--to", "trl"], ["export", "--to", "vllm"]):
        code, out, err = run([command[0], str(folder), *command[1:], "--json"], capsys)
        assert code == 0, err
        answers[command[0]] = json.loads(out)
    assert answers["status"]["state"] == "done"
    assert answers["status"]["rank"] == decided.decision.rank
    assert answers["status"]["adapter_sentence"] is None
    ranks = {row["rank"] for row in answers["decide"]["ranks"]}
    assert ranks == ({0, 1, 2, 4} if strategy == "descend" else {0, 1, 4})
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert decided.decision.sentence in report
    assert "not asked" not in report


def test_what_it_decided_is_the_adapter_that_is_exported(
    grid_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`descend` handed over a recovered truncation: the training that it comes from goes to trainers."""
    folder = begun_with(grid_run, "descend", tmp_path / "run")
    code, out, _ = run(["export", str(folder), "--to", "axolotl", "--json"], capsys)
    assert code == 0
    assert any("was trained at rank 4" in note and "2 steps of recovery" in note for note in json.loads(out)["notes"])
    assert "lora_r: 4" in (folder / "exports" / "axolotl" / "axolotl.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("strategy", REMOVED)
def test_the_name_is_answered_with_the_names_there_are(
    grid_run: Path,
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    strategy: str,
) -> None:
    folder = begun_with(grid_run, strategy, tmp_path / "run")
    before = (folder / "journal.jsonl").read_bytes()
    arguments = select_arguments(model_folder, completion_file, folder, "--max-steps", "20", "--strategy", strategy)
    code, out, err = run(arguments, capsys)
    assert code == 2
    assert out == ""
    assert err == f"rightrank: strategy {strategy!r} was removed; there are: bracket, grid, upward\n"
    assert (folder / "journal.jsonl").read_bytes() == before
    with pytest.raises(SettingsError, match="was removed; there are: bracket, grid, upward"):
        select_rank(str(model_folder), completion_file, tmp_path / "new", settings=small_settings(strategy=strategy))


def test_it_is_continued_by_a_strategy_that_there_is(
    model_folder: Path, completion_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials of one rank, learning rate and seed are the same under every strategy: none is trained again."""
    with monkeypatch.context() as before:
        before.setitem(strategies.STRATEGIES, "ladder", Grid)
        before.setattr(strategies, "REMOVED", ())
        as_begun = SETTINGS.model_copy(update={"strategy": "ladder"})
        select_rank(str(model_folder), completion_file, tmp_path / "begun", settings=as_begun)
    folder = begun_with(tmp_path / "begun", "ladder", tmp_path / "run")
    trained = [one.trial_id for one in Journal(folder / "journal.jsonl").read() if isinstance(one, TrialFinished)]
    selected = select_rank(str(model_folder), completion_file, folder, settings=SETTINGS)
    assert selected.handed_over is not None
    after = [one.trial_id for one in Journal(folder / "journal.jsonl").read() if isinstance(one, TrialFinished)]
    assert len(after) == len(set(after))
    assert set(trained) < set(after)
