"""`--json` gives one JSON object on stdout and nothing else there, or, where a command fails, nothing at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rightrank.cli import cli
from tests.report.test_views import journal_of
from tests.test_select import run
from tests.tiny import write_jsonl

TABLE = [{"rank": rank, "seed": seed, "value": 1 + 1 / rank + seed / 1000} for rank in (1, 4, 16) for seed in (0, 1)]


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a table, an unfinished run, an empty folder and a damaged journal."""
    (tmp_path / "model").symlink_to(model_folder)
    write_jsonl(tmp_path / "table.jsonl", TABLE)
    journal_of(tmp_path / "made_up")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "journal.jsonl").write_text("not json\n{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


FINE = [
    "decide table.jsonl",
    "plan model --ranks 1,4 --seq-len 64",
    "status made_up",
    "report made_up",
    "decide made_up",
]
FAILING = [
    "decide nowhere.csv",
    "decide empty",
    "plan empty --ranks 4",
    "plan model --ranks 0",
    "status empty",
    "status damaged",
    "report empty",
    "report damaged",
    "export made_up --to moon",
    "export made_up --to peft",
    "export empty --to peft",
    "inspect empty",
    "resize empty out --rank 4",
    "select model nowhere.jsonl --out run",
    "select empty table.jsonl --out run",
    "select model table.jsonl --out run",
    "select model table.jsonl --out made_up",
    "select model table.jsonl --out run --margin many",
    "select model table.jsonl --out run --ranks",
]


@pytest.mark.parametrize("command", FINE)
def test_an_answer_is_one_object(folder: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run([*command.split(), "--json"], capsys)
    assert status == 0
    assert isinstance(json.loads(out), dict)


@pytest.mark.parametrize("command", FAILING)
def test_a_failure_is_one_line_on_stderr(folder: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run([*command.split(), "--json"], capsys)
    assert status == 2
    assert out == ""
    assert err.startswith("rightrank: ")
    assert err.count("\n") == 1


def test_every_command_that_answers_has_json() -> None:
    without = {
        name for name, command in cli.commands.items() if "--json" not in {o for p in command.params for o in p.opts}
    }
    assert without == {"watch", "completion"}
