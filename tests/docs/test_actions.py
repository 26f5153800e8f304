"""The GitHub Actions example of docs/how-to/compare.md: its step is the command, and ends as the page says."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.adapters.adapters import make_adapter, rewrite, tensors_of
from tests.commands import run
from tests.docs.pages import ROOT, blocks
from tests.tiny import write_completions

pytestmark = pytest.mark.trains


def step() -> list[str]:
    (block,) = [block for block in blocks(ROOT / "docs" / "how-to" / "compare.md") if block.language == "yaml"]
    steps = yaml.safe_load(block.text)["jobs"]["adapter"]["steps"]
    (command,) = [one["run"] for one in steps if "compare" in one.get("run", "")]
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
    assert run(step(), capsys)[0] == 0
    noise = {name: value + torch.randn_like(value) for name, value in tensors_of(released).items()}
    rewrite(tmp_path / "candidate" / "adapter", noise)
    assert run(step(), capsys)[0] in (3, 4)
