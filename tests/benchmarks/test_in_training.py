"""The scripts of `benchmarks/in_training`, dry: a tiny model, a few rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.in_training import gsm8k, picture
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny import sentences, write_jsonl

pytestmark = pytest.mark.trains


def test_the_case_of_gsm8k_runs(model_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model: Any = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    train = write_jsonl(tmp_path / "train.jsonl", [{"query": text, "response": text} for text in sentences(6)])
    rows = [{"question": f"{number} and 1?", "answer": f"so #### {number + 1}"} for number in range(4)]
    test = write_jsonl(tmp_path / "test.jsonl", rows)
    options = [
        "--base",
        str(model_folder),
        "--adapter",
        str(tmp_path / "adapter"),
        "--train",
        str(train),
        "--test",
        str(test),
    ]
    further = ["--ranks", "4,2", "--new-tokens", "4", "--dtype", "float32", "--out", str(tmp_path / "out.json")]
    found = gsm8k.main([*options, *further])
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == found
    for how in ("svd", "kfac"):
        assert [one["rank"] for one in found[how]["candidates"]] == [8, 4, 2]
        assert all(0 <= one["accuracy"] <= 1 for one in found[how]["candidates"])


def test_the_picture_is_that_of_the_stored_results() -> None:
    """README's picture is drawn from `results.jsonl` and nothing else."""
    root = Path(sys.modules["benchmarks.in_training"].__path__[0]).parents[1]
    assert (root / "docs" / "images" / "in_training.svg").read_text(encoding="utf-8") == picture.drawing()
