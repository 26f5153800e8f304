"""Every command in a shell block and every Python block of the pages runs."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.commands import run
from tests.docs.pages import FRONT, GUIDES, PAGES, name_of, python_blocks, shell_commands
from tests.tiny import write_completions

# Run by tests of their own: the demo (in short), and what installs things or needs hours.
ELSEWHERE = ("make ", "pip ", "python -m ", "git ", "rightrank demo")
FAST = ["--max-steps", "4", "--batch-size", "4", "--seq-len", "32", "--eval-items", "8", "--device", "cpu"]

pytestmark = pytest.mark.trains


@pytest.fixture
def here(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the pages speak of: a model, data and a matrix."""
    shutil.copytree(model_folder, tmp_path / "model")
    write_completions(tmp_path / "data.jsonl", 80)
    (tmp_path / "jobs.yaml").write_text("model: ./model\njobs: {first: data.jsonl}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if shell_commands(page)], ids=name_of)
def test_commands_run(page: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other, made small by options that the pages need not show."""
    for command in shell_commands(page):
        if command.startswith(ELSEWHERE):
            continue
        program, *arguments = shlex.split(command)
        assert program == "rightrank", f"{page.name}: {command!r} is neither ours nor listed as run elsewhere"
        status, _, err = run(_made_small(arguments), capsys)
        assert status == 0, f"{command}: {err}"


@pytest.mark.parametrize("page", [page for page in [*FRONT, *GUIDES] if python_blocks(page)], ids=name_of)
def test_python_runs(page: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In order and in one namespace, after the page's commands where a block reads what they wrote."""
    if any(re.search(r"run/|-run/", block) for block in python_blocks(page)):
        test_commands_run(page, here, capsys)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in python_blocks(page):
        exec(compile(block, name_of(page), "exec", dont_inherit=True), namespace)


def _made_small(arguments: list[str]) -> list[str]:
    """The tiny model's matrices hold ranks up to 16."""
    if arguments[0] != "select":
        return arguments
    return [*arguments, *FAST, *([] if "--ranks" in arguments else ["--ranks", "1,4"])]
