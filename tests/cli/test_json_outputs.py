"""Test that `--json` prints exactly one JSON object on stdout, or nothing if the command fails.

Every command with `--json` is tested, with its answers and its failures.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rightrank import Selected, select_rank
from rightrank.schema.trials import SCHEMA_VERSION
from tests.adapters.adapters import make_adapter, make_base
from tests.commands import COMMANDS, run
from tests.report.runs import write_journal
from tests.tiny import build_small_settings, write_completions, write_jsonl

pytestmark = pytest.mark.trains

TABLE = [
    {"rank": rank, "seed": seed, "eval_loss": 1 + 1 / rank + seed / 1000} for rank in (1, 4, 16) for seed in (0, 1)
]
SMALL = "--goal training-rank --ranks 1,4 --learning-rates 1e-2 --max-steps 4 --batch-size 4 --seq-len 32 --max-eval-examples 8 --device cpu"


@pytest.fixture(scope="module")
def selected(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Selected:
    """Run a selection."""
    folder = tmp_path_factory.mktemp("run")
    settings = build_small_settings(max_steps=2, num_evaluations=1, max_eval_examples=8)
    return select_rank(str(model_folder), write_completions(folder / "data.jsonl"), folder / "run", settings=settings)


@pytest.fixture(scope="module")
def prepared(selected: Selected, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with models, an adapter, data, a table, runs in every state, an empty folder and a damaged journal."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "model").symlink_to(model_folder)
    make_adapter(make_base(folder / "base"), folder / "adapter", rank=4)
    make_adapter(model_folder, folder / "of_model", rank=2)
    make_adapter(model_folder, folder / "also_of_model", rank=4)
    write_completions(folder / "data.jsonl")
    write_jsonl(folder / "table.jsonl", TABLE)
    shutil.copytree(selected.run, folder / "done")
    write_journal(folder / "made_up")
    (folder / "empty").mkdir()
    (folder / "damaged").mkdir()
    (folder / "damaged" / "journal.jsonl").write_text("not json\n{}\n")
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the folder, since commands write next to the files that they read."""
    shutil.copytree(prepared, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


FINE = [
    "decide table.jsonl",
    "decide made_up",
    "decide done --margin 0.5",
    "expect gpt2 data.jsonl --ranks 4,16",
    "plan model --ranks 1,4 --seq-len 64",
    "plan model --ranks 1,4 --seq-len 64 --memory 24GiB",
    "status made_up",
    "status done",
    "report made_up",
    "report done",
    "select --out done",
    "inspect adapter",
    "resize adapter small --rank 2",
    "compare of_model of_model --model model --data data.jsonl --set seq_len=32",
    f"select model data.jsonl --dry-run {SMALL}",
    "export done --to vllm",
    "export adapter of_model --to sglang --base model --out served",
    f"select model data.jsonl --out run {SMALL}",
]
FAILING = [
    "decide nowhere.csv",
    "decide empty",
    "decide damaged",
    "decide table.jsonl --margin -1",
    "expect gpt2 --rows 0",
    "plan empty --ranks 4",
    "plan model --ranks 0",
    "plan model --ranks 4 --memory 24",
    "plan",
    "status empty",
    "status damaged",
    "report empty",
    "report damaged",
    "select --out empty",
    "export made_up --to moon",
    "export made_up --to vllm",
    "export empty --to vllm",
    "export done",
    "inspect empty",
    "inspect",
    "inspect model",
    "compare empty of_model --model model --data data.jsonl",
    "compare of_model of_model --model model --data nowhere.jsonl",
    "compare of_model of_model --model model --data data.jsonl --base-b 3bit",
    "resize empty out --rank 4",
    "resize adapter out",
    "resize adapter out --rank 0",
    "resize adapter model --rank 2",
    "select model nowhere.jsonl --out run",
    "select empty table.jsonl --out run",
    "select model table.jsonl --out run",
    "select model table.jsonl --out made_up",
    "select model table.jsonl --out run --margin many",
    "select model table.jsonl --out run --ranks",
    "select model table.jsonl --out run --metric bleurt",
    "select model table.jsonl --out run --metric wer=no_such_file.py:wer",
    "select model table.jsonl --out run --set metrics=acc=nowhere:score",
    "select model table.jsonl --out run --report-to nobody",
    "select model data.jsonl --out run --set nonsense=1",
    "demo --out table.jsonl/below",
    "demo --nonsense",
]
UNFINISHED = [  # commands that start and fail later
    f"select model data.jsonl --out run {SMALL.replace('1e-2', '1e30')}",
]


def parse_only_object(text: str) -> dict[str, object]:
    """Parse the only object on stdout."""
    assert text.endswith("\n")
    assert text.count("\n") == 1
    answer = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert isinstance(answer, dict)
    return answer


@pytest.mark.parametrize("command", FINE)
def test_an_answer_is_one_object(folder: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run([*command.split(), "--json"], capsys)
    assert status == 0, err
    assert parse_only_object(out)["schema_version"] == SCHEMA_VERSION


@pytest.mark.parametrize(
    ("command", "expected"),
    [(command, 2) for command in FAILING] + [(command, 1) for command in UNFINISHED],
)
def test_a_failure_is_one_line_on_stderr(
    folder: Path, command: str, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run([*command.split(), "--json"], capsys)
    assert status == expected
    assert out == ""
    *progress, complaint = err.splitlines(keepends=True)
    assert expected == 1 or all(line.startswith(("run folder ", "reading ")) for line in progress)
    assert complaint.startswith("rightrank: ")
    assert complaint.count("\n") == 1
    assert "Traceback" not in err


def test_every_command_with_json_is_tried_both_ways() -> None:
    with_json = {name for name, command in COMMANDS.items() if any("--json" in p.opts for p in command.params)}
    assert set(COMMANDS) == with_json
    assert {command.split()[0] for command in FINE} | {"demo"} == with_json
    assert {command.split()[0] for command in FAILING} == with_json
