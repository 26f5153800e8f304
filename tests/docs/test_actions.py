"""Test the GitHub Actions example of docs/how-to/compare.md: its step runs the command, and exits as the page states."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from tests.adapters.adapters import load_tensors, make_adapter, write_tensors
from tests.commands import run
from tests.docs.pages import ROOT, iterate_blocks
from tests.tiny import write_completions

pytestmark = pytest.mark.trains


def read_step() -> list[str]:
    (block,) = [block for block in iterate_blocks(ROOT / "docs" / "how-to" / "compare.md") if block.language == "yaml"]
    steps = yaml.safe_load(block.text)["jobs"]["adapter"]["steps"]
    (command,) = [step["run"] for step in steps if "compare" in step.get("run", "")]
    program, *arguments = shlex.split(command)
    assert program == "rightrank"
    return arguments


def test_the_step_passes_and_fails_the_job(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    write_completions(tmp_path / "held_out.jsonl", 40)
    released = make_adapter(tmp_path / "model", tmp_path / "released" / "adapter", rank=2)
    shutil.copytree(released, tmp_path / "candidate" / "adapter")
    monkeypatch.chdir(tmp_path)
    assert run(read_step(), capsys)[0] == 0
    noise = {name: value + torch.randn_like(value) for name, value in load_tensors(released).items()}
    write_tensors(tmp_path / "candidate" / "adapter", noise)
    assert run(read_step(), capsys)[0] in (3, 4)


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
