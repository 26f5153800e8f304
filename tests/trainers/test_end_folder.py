"""Test the result folder of a training: files that no measurement wrote are never changed."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from rightrank import SmallestAdapter
from rightrank.schema.errors import DataError, RunFolderError
from rightrank.trainers.measurement import require_result_folder
from rightrank.trainers.smallest import keep_smallest
from tests.trainers.trainings import Rows, make_batches, make_peft_model, run_training

pytestmark = pytest.mark.trains


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("content", ["a run", "a file", "an adapter", "a damaged journal"])
def test_a_folder_of_another_run_or_program_is_refused_and_stays_as_it_is(
    content: str, small_run: Path, model_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    out = tmp_path / "rightrank"
    if content == "a run":
        shutil.copytree(small_run / "run", out)
    elif content == "a file":
        out.write_text("mine")
    else:
        (out / "adapter").mkdir(parents=True) if content == "an adapter" else out.mkdir()
        (out / ("adapter/weights.bin" if content == "an adapter" else "journal.jsonl")).write_bytes(b"\xff\xfe")
    files_before = read_files(tmp_path)
    with pytest.raises(RunFolderError, match="give another folder"):
        require_result_folder(out)
    with pytest.raises(RunFolderError, match="give another folder"):
        keep_smallest(make_peft_model(model_folder), make_batches(rows[140:170]), out=out, margin=1.0)
    with pytest.raises(RunFolderError, match="give another folder"):  # before the first step
        run_training(model_folder, rows, tmp_path, SmallestAdapter)
    assert read_files(tmp_path) == files_before


def test_an_earlier_result_is_replaced_and_own_files_stay(
    model_folder: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep the earlier result if the disk is full."""
    out = tmp_path / "rightrank"
    for steps, margin in ((2, 1.0), (3, 0.05)):
        callback = run_training(model_folder, rows, tmp_path, partial(SmallestAdapter, margin=margin), max_steps=steps)
        assert callback.result is not None
        assert json.loads((out / "answer.json").read_text(encoding="utf-8"))["margin"] == margin
        (out / "notes.txt").write_text("mine")
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "answer.json", "notes.txt", "report.html"]
    files_before = read_files(out)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rightrank.trainers.measurement._write_result", full)
    with pytest.raises(OSError, match="No space left"):
        keep_smallest(make_peft_model(model_folder), make_batches(rows[140:170]), out=out, margin=1.0)
    shutil.rmtree(out / "trained")
    assert read_files(out) == files_before


def test_an_encoder_without_a_head_is_refused_in_one_line(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = get_peft_model(transformers.BertModel(config), LoraConfig(r=4, target_modules=["query", "value"]))
    rows = [{"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.tensor([0, 1])}]
    with pytest.raises(DataError, match="BertModel: no loss per example can be computed from these batches"):
        keep_smallest(model, rows, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
