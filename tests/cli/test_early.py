"""Test what works without torch: refusals of invalid requests, the first line of output, and commands on run folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rightrank.adapters.adapter_files import open_adapter
from rightrank.adapters.resize import resize_adapter
from rightrank.bases.safetensors_files import open_tensors
from tests.tiny import write_adapter, write_jsonl

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
        (["./modle", "train.jsonl"], "no such folder; give a model folder"),
        (["no-such-model", "train.jsonl"], "no such folder, and the hub has no such model or does not answer"),
        (["owner/no-such-model", "train.jsonl"], "no such folder, and the hub has no such model or does not answer"),
    ],
)
def test_missing_files_are_named_before_torch_is_imported(files: Path, arguments: list[str], message: str) -> None:
    command = json.dumps(["select", *arguments, "--out", "run"])
    process = subprocess.run([sys.executable, "-c", CODE, command], capture_output=True, text=True, cwd=files)
    assert process.stdout.split() == ["2", "False"], process.stderr
    assert len(process.stderr.splitlines()) == 1
    assert message in process.stderr
    assert not (files / "run").exists()


WITHOUT_TORCH = """\
import sys, json
from rightrank.cli import main
sys.modules["torch"] = None  # an import then raises ModuleNotFoundError
for command in json.loads(sys.argv[1]):
    try:
        main(command)
    except SystemExit as ended:
        print(ended.code)
"""


def test_adapters_are_inspected_resized_and_exported_without_torch(files: Path) -> None:
    write_adapter(files / "adapter")
    adapter = open_adapter(files / "adapter")
    resize_adapter(adapter, files / "uneven", {module.name: 1 + n for n, module in enumerate(adapter.modules)})
    commands = [
        ["inspect", "adapter", "--json"],
        ["resize", "adapter", "small", "--rank", "1"],
        ["export", "uneven", "--to", "vllm", "--out", "served"],
    ]
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)], capture_output=True, text=True, cwd=files
    )
    assert process.stdout.startswith("{"), process.stderr
    assert process.stdout.splitlines().count("0") == len(commands), process.stderr
    for name, ranks in (("small", {1}), ("uneven", {1, 2}), ("served/uneven", {2})):
        shapes = open_tensors(files / name / "adapter_model.safetensors").shapes
        assert {min(shape) for shape in shapes.values()} == ranks


def test_a_terminal_shows_a_line_before_anything_is_loaded(files: Path) -> None:
    ours, theirs = os.openpty()
    arguments = json.dumps(["select", "./modle", "train.jsonl", "--out", "run"])
    process = subprocess.run([sys.executable, "-c", CODE, arguments], stdout=subprocess.PIPE, stderr=theirs, cwd=files)
    first, *_, last = os.read(ours, 4096).decode().splitlines()
    os.close(ours)
    os.close(theirs)
    assert process.stdout.split() == [b"2", b"False"]
    assert first.endswith("checking the request, then loading model and data …")
    assert "no such folder; give a model folder" in last


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
