"""Every command in the docs runs, every link resolves, every setting is described."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from rightrank.settings import SelectSettings
from tests.commands import run
from tests.tiny import write_completions

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMANDS = re.compile(r"```(?:sh|bash|console)\n(.*?)```", re.DOTALL)
# Run by tests of their own: the demo (in short), and what installs things or needs hours.
ELSEWHERE = ("make ", "pip ", "python -m ", "git ", "rightrank demo")
FAST = ["--max-steps", "4", "--batch-size", "4", "--seq-len", "32", "--eval-items", "8", "--device", "cpu"]


def commands(page: Path) -> list[str]:
    blocks = COMMANDS.findall(page.read_text(encoding="utf-8"))
    lines = [line.removeprefix("$ ").strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "#", "mailto:")):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_commands_run(
    page: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder with a `model`, data and a matrix, made small by options that the docs need not show."""
    shutil.copytree(model_folder, tmp_path / "model")
    write_completions(tmp_path / "data.jsonl")
    (tmp_path / "jobs.yaml").write_text("model: ./model\njobs: {first: data.jsonl}\n")
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        if command.startswith(ELSEWHERE):
            continue
        program, *arguments = shlex.split(command)
        assert program == "rightrank", f"{page.name}: {command!r} is neither ours nor listed as run elsewhere"
        if arguments[0] == "select":
            arguments += FAST
            arguments = _small_ranks(arguments)
        status, _, err = run(arguments, capsys)
        assert status == 0, f"{command}: {err}"


def test_make_targets_in_the_docs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for command in commands(page):
            if command.startswith("make "):
                assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command


def test_every_setting_is_described() -> None:
    text = (ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
    described = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", text, re.MULTILINE)
    assert [name for name, _ in described] == list(SelectSettings.model_fields)


def _small_ranks(arguments: list[str]) -> list[str]:
    """The tiny model's matrices hold ranks up to 16."""
    if "--ranks" not in arguments:
        return [*arguments, "--ranks", "1,4"]
    return arguments
