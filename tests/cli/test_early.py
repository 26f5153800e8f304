"""Test what works without torch: refusals of invalid requests, the first line of output, and commands on run folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import write_jsonl

pytestmark = pytest.mark.trains

CODE = """\
import sys, json
from rightrank.cli import main
try:
    main(json.loads(sys.argv[1]))
except SystemExit as ended:
    print(ended.code, "torch" in sys.modules)
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "train.jsonl", "--strategy", "brackett"], "did you mean 'bracket'"),
        (["model", "trian.jsonl"], "no such file or folder (did you mean 'train.jsonl'?);"),
        (["model", "train.jsonl", "--validation", "held.jsonl"], "held.jsonl: no such file or folder"),
        (["./modle", "train.jsonl"], "no such folder (did you mean 'model'?);"),
        (["no-such-model", "train.jsonl"], "no such folder, and the hub is switched off"),
        (["owner/no-such-model", "train.jsonl"], "no such folder, and the hub is switched off"),
    ],
)
def test_missing_files_are_named_before_torch_is_imported(files: Path, arguments: list[str], message: str) -> None:
    command = json.dumps(["select", *arguments, "--out", "run"])
    process = subprocess.run([sys.executable, "-c", CODE, command], capture_output=True, text=True, cwd=files)
    assert process.stdout.split() == ["2", "False"], process.stderr
    assert len(process.stderr.splitlines()) == 1
    assert message in process.stderr
    assert not (files / "run").exists()


def test_a_terminal_shows_a_line_before_anything_is_loaded(files: Path) -> None:
    ours, theirs = os.openpty()
    arguments = json.dumps(["select", "./modle", "train.jsonl", "--out", "run"])
    process = subprocess.run([sys.executable, "-c", CODE, arguments], stdout=subprocess.PIPE, stderr=theirs, cwd=files)
    first, *_, last = os.read(ours, 4096).decode().splitlines()
    os.close(ours)
    os.close(theirs)
    assert process.stdout.split() == [b"2", b"False"]
    assert first.endswith("checking the request, then loading model and data …")
    assert "did you mean 'model'?" in last


LIGHT = """\
import sys
from rightrank.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert ended.code == 0, ended.code
print(sorted({"torch", "transformers"} & set(sys.modules)), file=sys.stderr)
"""


def test_help_loads_no_numbers_and_no_screen() -> None:
    """List all commands."""
    script = LIGHT.replace('{"torch", "transformers"}', '{"torch", "transformers", "numpy", "rich"}')
    process = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True)
    assert "decide" in process.stdout
    assert process.stderr == "[]\n"


@pytest.fixture
def run_folder(small_run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(small_run / "run", folder)
    return folder


@pytest.mark.parametrize("command", [["status"], ["decide"], ["export", "--to", "vllm"]])
def test_a_command_on_a_run_folder_imports_no_torch(run_folder: Path, command: list[str]) -> None:
    arguments = [sys.executable, "-c", LIGHT, command[0], str(run_folder), *command[1:]]
    process = subprocess.run(arguments, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stderr.splitlines()[-1] == "[]"
