"""Commands on a run folder start without torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.trains

RUN = Path(__file__).parents[1] / "fixtures" / "runs" / "schema-3" / "run"
CODE = """\
import sys
from rightrank.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert ended.code == 0, ended.code
print(sorted({"torch", "transformers"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(RUN, folder)
    shutil.copytree(next((folder / "trials").iterdir()), folder / "adapter")
    return folder


@pytest.mark.parametrize("command", [["status"], ["watch"], ["decide"], ["export", "--to", "vllm"], ["repair"]])
def test_a_command_on_a_run_folder_imports_no_torch(run_folder: Path, command: list[str]) -> None:
    arguments = [sys.executable, "-c", CODE, command[0], str(run_folder), *command[1:]]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
