"""Run every command in a shell block and every Python block of the pages, run the action, and build the site."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.adapters.kind_checks import make_model
from tests.commands import run
from tests.docs.pages import PAGES, ROOT, SHELL, get_page_name, iterate_blocks, list_commands
from tests.tiny import make_tokenizer, write_completions, write_pairs

pytestmark = pytest.mark.trains


# Run by tests of their own: the demo (in short), and what installs things or needs hours.
ELSEWHERE = ("make ", "pip ", "python -m ", "git ", "rightrank demo")
# Their output does not depend on the model or the data.
SHOWN = ("rightrank expect", "rightrank decide --example", "rightrank export")
SCREEN_ROWS = re.compile(r"^(adapter|load|details)\b", re.MULTILINE)  # of the final screen, whatever the answer
FAST = [
    "--max-steps",
    "4",
    "--set",
    "checkpoint=last",
    "--batch-size",
    "4",
    "--seq-len",
    "32",
    "--max-eval-examples",
    "8",
    "--device",
    "cpu",
]
SMALL = {"--ranks": "1,4", "--learning-rates": "1e-2"}  # where a page does not say its own
CODE = [
    page for page in PAGES if any(block.runs and block.language in (*SHELL, "python") for block in iterate_blocks(page))
]


@pytest.fixture(scope="module")
def page_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that the pages refer to: a model, a mixture of experts, data and preference pairs."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(model_folder, folder / "model")
    tokenizer = make_tokenizer()
    make_model("mixtral", len(tokenizer)).save_pretrained(folder / "mixture")
    tokenizer.save_pretrained(folder / "mixture")
    write_completions(folder / "data.jsonl", 80)
    write_pairs(folder / "pairs.jsonl", 80)
    return folder


@pytest.fixture
def here(page_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a copy of that folder."""
    shutil.copytree(page_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs by their command: several pages begin with the same one."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing\\w*` is deprecated:FutureWarning")
@pytest.mark.parametrize("page", CODE, ids=get_page_name)
def test_code_runs(
    page: Path, here: None, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block in one folder, Python in one namespace; selections made small by options that pages need not show.

    A text block directly after Python or after a command of `SHOWN` is part of its output. After a selection, whose numbers
    depend on the model, it has the same rows.
    """
    monkeypatch.setenv("COLUMNS", "80")
    namespace: dict[str, object] = {"__name__": "page"}
    shown, is_selection = "", False
    for block in iterate_blocks(page):
        if block.language == "text" and block.follows_block and shown:
            if is_selection:
                assert SCREEN_ROWS.findall(block.text) == SCREEN_ROWS.findall(shown) != []
            else:
                assert block.text in shown
        shown, is_selection = "", False
        if block.language == "python" and block.runs:
            exec(compile(block.text, get_page_name(page), "exec", dont_inherit=True), namespace)
            shown = capsys.readouterr().out
        elif block.language in SHELL and block.runs:
            for command in list_commands(block.text):
                if not command.startswith(ELSEWHERE):
                    output = _run(command, runs, capsys)
                    is_selection = command.startswith("rightrank select") and "--dry-run" not in command
                    shown = output if is_selection or command.startswith(SHOWN) else ""


def _run(command: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> str:
    program, *arguments = shlex.split(command)
    assert program == "rightrank", f"{command!r} is neither ours nor listed as run elsewhere"
    if arguments[0] != "select":
        return _succeed(arguments, capsys)
    if "--dry-run" in arguments:
        return _succeed([*arguments, *FAST], capsys)
    out = Path(arguments[arguments.index("--out") + 1] if "--out" in arguments else "data-model")
    run_folder = runs / str(abs(hash(tuple(arguments))))
    if run_folder.exists() and not out.exists():
        shutil.copytree(run_folder, out)
        return ""
    is_new = not out.exists()
    # the tiny model's matrices hold ranks up to 16
    small = [word for name, value in SMALL.items() if name not in arguments for word in (name, value)]
    fewer = ["--workers", "1"] if "--workers" in arguments else []  # `test_workers` has several
    output = _succeed([*arguments, *FAST, *small, *fewer], capsys)
    if is_new:
        shutil.copytree(out, run_folder)
    return output


def _succeed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    status, out, err = run(arguments, capsys)
    # A comparison may find that so few examples cannot tell.
    assert status in ((0, 4) if arguments[0] in ("export", "compare") else (0,)), f"{shlex.join(arguments)}: {err}"
    return out


def read_action() -> list[dict[str, str]]:
    steps: list[dict[str, str]] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["runs"]["steps"]
    return steps


@pytest.mark.parametrize(
    ("status", "undecided", "expected"),
    [(0, "fail", 0), (3, "pass", 3), (4, "fail", 4), (4, "pass", 0), (2, "pass", 2)],
)
def test_the_action_runs_the_command_and_ends_as_it_does(
    status: int, undecided: str, expected: int, tmp_path: Path
) -> None:
    """Run its script with a program of the same name that prints its arguments."""
    program = tmp_path / "rightrank"
    program.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@"\nexit {status}\n', encoding="utf-8")
    program.chmod(0o755)
    variables = {"A": "run/adapter", "B": "my model.gguf", "MODEL": "model", "DATA": "rows.jsonl", "MARGIN": "0.01"}
    options = {"OPTIONS": "--base-b 4bit", "UNDECIDED": undecided, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (step,) = [step for step in read_action() if "rightrank compare" in step["run"]]
    completed = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", step["run"]], env=variables | options, capture_output=True, text=True
    )
    assert completed.returncode == expected, completed.stderr
    assert completed.stdout.split("\n")[:-1] == [
        "compare", "run/adapter", "my model.gguf", "--model", "model", "--data", "rows.jsonl", "--base-b", "4bit", "--margin", "0.01",
    ]  # fmt: skip


def test_the_action_s_inputs_are_those_of_its_page() -> None:
    inputs = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["inputs"]
    (block,) = [block for block in iterate_blocks(ROOT / "docs" / "how-to" / "ship.md") if block.language == "yaml"]
    steps = yaml.safe_load(block.text)["jobs"]["shipped"]["steps"]
    used = next(step["with"] for step in steps if "with" in step)
    required = {name for name, value in inputs.items() if value.get("required")}
    assert required <= used.keys() <= inputs.keys()
