"""Test the result folder of a training: files that the run did not write are never deleted."""

from __future__ import annotations

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from rightrank import SmallestAdapter, export
from rightrank.api.folders import status
from rightrank.runs.folder import RunFolder
from rightrank.schema.errors import ModelError, RunError, RunFolderError
from rightrank.trainers.smallest import keep_smallest
from rightrank.trainers.truncation_run import require_result_folder, resume_measurement
from tests.trainers.trainings import Rows, make_batches, make_peft_model, run_training

pytestmark = pytest.mark.trains

Files = dict[str, bytes | str]


def read_files(folder: Path) -> Files:
    """Return the content of every file but locks, and the target of every symbolic link."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock" and (path.is_symlink() or path.is_file())
    }


def test_another_kind_of_run_is_refused_and_stays_as_it_is(
    small_run: Path, model_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    run = tmp_path / "rightrank"
    shutil.copytree(small_run / "run", run)
    (run / "notes.txt").write_text("mine")
    files_before = read_files(run)
    with pytest.raises(RunFolderError, match="a run of another kind, which is left unchanged"):
        keep_smallest(make_peft_model(model_folder), make_batches(rows[140:170]), out=run, margin=1.0)
    with pytest.raises(RunFolderError, match="a run of another kind"):  # before the first step
        run_training(model_folder, rows, tmp_path, SmallestAdapter)
    assert read_files(run) == files_before


def test_an_earlier_result_is_moved_aside_and_own_files_stay(
    model_folder: Path, rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, elsewhere = tmp_path / "rightrank", tmp_path / "elsewhere"
    first = run_training(
        model_folder, rows, tmp_path, partial(SmallestAdapter, margin=1.0, max_examples=30), max_steps=2
    )
    assert first.result is not None
    export(out, "vllm")
    (out / "notes.txt").write_text("mine")
    elsewhere.mkdir()
    (elsewhere / "large").write_text("on another disk")
    (out / "link").symlink_to(elsewhere, target_is_directory=True)
    shutil.rmtree(out / "figures")
    (out / "figures").symlink_to(Path("..") / "elsewhere", target_is_directory=True)
    files_before = read_files(out)
    with caplog.at_level(logging.WARNING, "rightrank"):
        second = run_training(
            model_folder, rows, tmp_path, partial(SmallestAdapter, margin=0.05, max_examples=30), max_steps=3
        )
    assert second.result is not None
    aside = out / "earlier-1"
    assert f"the result of an earlier training was moved to {aside}" in caplog.text
    files_after = read_files(out)
    for name, content in files_before.items():
        moved_name = name if name in ("notes.txt", "link") else f"earlier-1/{name}"
        assert files_after[moved_name] == content or name == "figures"
    assert (aside / "figures" / "large").read_text() == "on another disk"  # the relative link leads to the same place
    assert [path.name for path in elsewhere.iterdir()] == ["large"]
    for folder, callback in ((aside, first), (out, second)):
        assert status(folder).state == "done"
        answer = json.loads((folder / "decision.json").read_text(encoding="utf-8"))["adapter_answer"]
        assert (answer["margin"], answer["trial_id"]) == (callback.margin, callback.result.answer.trial_id)
    assert not (out / "exports").exists()  # those of the earlier result lie beside it


def test_an_end_in_use_changes_nothing(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    out, model = tmp_path / "run", make_peft_model(model_folder)
    keep_smallest(model, make_batches(rows[140:170]), out=out, margin=1.0)
    files_before = read_files(out)
    with RunFolder(out).lock(), pytest.raises(RunFolderError, match="another process is using this folder"):
        keep_smallest(model, make_batches(rows[140:170]), out=out, margin=1.0)
    with RunFolder(out).lock(), pytest.raises(RunFolderError, match="another process is using this folder"):
        require_result_folder(out)
    assert read_files(out) == files_before


def test_an_end_that_fails_before_it_has_begun_moves_nothing_and_blocks_nothing(
    model_folder: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, model = tmp_path / "run", make_peft_model(model_folder)
    keep_smallest(model, make_batches(rows[140:170]), out=out, margin=1.0)
    files_before = read_files(out)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for folder in (out, tmp_path / "new"):
        with monkeypatch.context() as patch:
            patch.setattr("rightrank.trainers.truncation_run._write_resume_files", full)
            with pytest.raises(RunError, match="No space left"):
                keep_smallest(model, make_batches(rows[140:170]), out=folder, margin=1.0)
    assert read_files(out) == files_before
    keep_smallest(model, make_batches(rows[140:170]), out=tmp_path / "new", margin=1.0)


def test_a_measurement_that_waits_is_moved_aside_and_can_still_be_made(
    model_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    for _ in range(2):
        waiting = partial(SmallestAdapter, margin=1.0, max_examples=30, measure=False)
        run_training(model_folder, rows, tmp_path, waiting, max_steps=2)
    for folder in (tmp_path / "rightrank" / "earlier-1", tmp_path / "rightrank"):
        assert resume_measurement(folder).adapter is not None


@pytest.mark.parametrize("content", ["a file", "files", "a journal of an unknown kind", "a journal that is damaged"])
def test_a_folder_that_no_end_wrote_is_refused_and_stays_as_it_is(
    content: str, model_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if content == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        name = "weights.bin" if content == "files" else "journal.jsonl"
        text = b'{"settings": {"trainer": "train.train"}}\n' if "unknown" in content else b"\xff\xfe{damaged\n"
        (out / name).write_bytes(text)
    files_before = read_files(tmp_path)
    with pytest.raises(RunFolderError, match=r"give (another|an empty or a new) folder"):
        require_result_folder(out)
    with pytest.raises(RunFolderError, match=r"give (another|an empty or a new) folder"):
        keep_smallest(make_peft_model(model_folder), make_batches(rows[140:170]), out=out, margin=1.0)
    assert read_files(tmp_path) == files_before


def test_an_encoder_without_a_head_is_refused_in_one_line(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = get_peft_model(transformers.BertModel(config), LoraConfig(r=4, target_modules=["query", "value"]))
    rows = [{"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.tensor([0, 1])}]
    with pytest.raises(ModelError, match=r"BertModel returns no logits: .*; give a model with a classification head"):
        keep_smallest(model, rows, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
