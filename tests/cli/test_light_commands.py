"""Commands on a run folder start without torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.trains

CODE = """\
import sys
from rightrank.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert ended.code == 0, ended.code
print(sorted({"torch", "transformers"} & set(sys.modules)), file=sys.stderr)
"""

REFUSED = CODE.replace("ended.code == 0", "ended.code == 2")


@pytest.fixture
def run_folder(small_run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(small_run / "run", folder)
    return folder


def test_the_adapter_of_a_run_folder_is_named_without_torch(run_folder: Path) -> None:
    for command in (
        ["inspect", str(run_folder)],
        ["resize", str(run_folder), "out", "--rank", "1"],
        ["compare", "base", str(run_folder), "--model", "model", "--data", "x.jsonl"],
    ):
        done = subprocess.run([sys.executable, "-c", REFUSED, *command], capture_output=True, text=True)
        message, modules = done.stderr.splitlines()
        assert message.endswith(f"give {run_folder / 'adapter'}, the adapter in it")
        assert modules == "[]"


@pytest.mark.parametrize("command", [["status"], ["decide"], ["export", "--to", "vllm"], ["repair"]])
def test_a_command_on_a_run_folder_imports_no_torch(run_folder: Path, command: list[str]) -> None:
    arguments = [sys.executable, "-c", CODE, command[0], str(run_folder), *command[1:]]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
