"""Check that the method in one file gives the same rank as the command on the same data."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.commands import run

METHOD = Path(__file__).parents[2] / "examples" / "the_method.py"


def test_the_page_and_the_command_name_the_same_rank(
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    margin, rank = "0.1", 8
    rows = completion_file.read_text(encoding="utf-8").splitlines()
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    train.write_text("\n".join(rows[:140]), encoding="utf-8")
    held_out.write_text("\n".join(rows[140:]), encoding="utf-8")
    shared = ["--ranks", "1,2,4,8,16", "--margin", margin]
    names = ["the_method.py", str(model_folder), str(train), str(held_out)]
    monkeypatch.setattr(sys, "argv", [*names, *shared, "--learning-rate", "1e-2", "--steps", "100"])
    runpy.run_path(str(METHOD), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"Rank {rank} of 16 is enough."
    folder = ["--out", str(tmp_path / "run"), "--validation", str(held_out), "--goal", "adapter", "--json", "--quiet"]
    chosen = ["--learning-rates", "1e-2", "--max-steps", "100", "--batch-size", "8", "--lora-alpha", "32"]
    status, out, err = run(["select", str(model_folder), str(train), *folder, *shared, *chosen], capsys)
    assert status == 0, err
    assert json.loads(out)["handed_over"]["rank"] == rank


def test_the_page_is_one_page_and_uses_nothing_of_the_package() -> None:
    text = METHOD.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert "import rightrank" not in text
    assert "from rightrank" not in text
