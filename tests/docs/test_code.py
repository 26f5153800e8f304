"""Every command in a shell block and every Python block of the pages runs."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from tests.commands import run
from tests.docs.pages import PAGES, SHELL, blocks, lines_of, name_of
from tests.models.kind_cases import make_model
from tests.tiny import make_tokenizer, write_completions, write_pairs

# Run by tests of their own: the demo (in short), and what installs things or needs hours.
ELSEWHERE = ("make ", "pip ", "python -m ", "git ", "rightrank demo")
FAST = ["--max-steps", "4", "--batch-size", "4", "--seq-len", "32", "--eval-items", "8", "--device", "cpu"]
SMALL = {"--ranks": "1,4", "--learning-rates": "1e-2"}  # where a page does not say its own
CODE = [page for page in PAGES if any(block.runs and block.language in (*SHELL, "python") for block in blocks(page))]

pytestmark = [
    pytest.mark.trains,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing\\w*` is deprecated:FutureWarning"),  # of TRL itself
]


@pytest.fixture(scope="module")
def place(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the pages speak of: a model, a mixture of experts, data and preference pairs."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(model_folder, folder / "model")
    tokenizer = make_tokenizer()
    make_model("mixtral", len(tokenizer)).save_pretrained(folder / "mixture")
    tokenizer.save_pretrained(folder / "mixture")
    write_completions(folder / "data.jsonl", 80)
    write_pairs(folder / "pairs.jsonl", 80)
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a copy of that folder."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs by their command: several pages begin with the same one."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("page", CODE, ids=name_of)
def test_code_runs(page: Path, here: None, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Block by block in one folder, Python in one namespace; selections made small by options that pages need not show."""
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if block.language == "python" and block.runs:
            exec(compile(block.text, name_of(page), "exec", dont_inherit=True), namespace)
        elif block.language in SHELL and block.runs:
            for command in lines_of(block.text):
                if not command.startswith(ELSEWHERE):
                    _run(command, runs, capsys)


def _run(command: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(command)
    assert program == "rightrank", f"{command!r} is neither ours nor listed as run elsewhere"
    if arguments[0] != "select":
        _succeed(arguments, capsys)
        return
    if "--dry-run" in arguments:
        _succeed([*arguments, *FAST], capsys)
        return
    out = Path(arguments[arguments.index("--out") + 1])
    kept = runs / str(abs(hash(tuple(arguments))))
    if kept.exists() and not out.exists():
        shutil.copytree(kept, out)
        return
    is_new = not out.exists()
    # the tiny model's matrices hold ranks up to 16
    small = [part for name, value in SMALL.items() if name not in arguments for part in (name, value)]
    fewer = ["--workers", "1"] if "--workers" in arguments else []  # `test_workers` has several
    _succeed([*arguments, *FAST, *small, *fewer], capsys)
    if is_new:
        shutil.copytree(out, kept)


def _succeed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(arguments, capsys)
    # The check of an export may find that so few examples cannot tell.
    assert status in ((0, 4) if arguments[0] == "export" else (0,)), f"{shlex.join(arguments)}: {err}"
