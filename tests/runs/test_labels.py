"""Classifiers: labels and their order go from the data into the adapter's folder, and from there into every later use."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rightrank import select_rank
from rightrank.runs.run import Selected
from tests.tiny import build_small_settings, write_jsonl

LABELS = ["news", "art", "sport", "law"]  # not in the order of the alphabet
WORDS = {"news": "the cat sat", "art": "red house", "sport": "run far", "law": "blue sea"}


def _make_rows(count: int, seed: int, labels: list[str] = LABELS) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    chosen = generator.choices(labels, weights=[6, 3, 2, 1][: len(labels)], k=count)
    return [{"text": f"{WORDS[label]} by noon {generator.randint(0, 9**6)}", "label": label} for label in chosen]


@pytest.fixture(scope="module")
def selected(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Selected:
    """Train a classifier of four labels."""
    folder = tmp_path_factory.mktemp("classifier")
    (folder / "data").mkdir()
    write_jsonl(folder / "data" / "train.jsonl", _make_rows(160, 0))
    write_jsonl(folder / "data" / "validation.jsonl", _make_rows(48, 1))
    settings = build_small_settings(
        goal="adapter",
        strategy="bracket",
        metric="accuracy",
        metrics=("macro_f1",),
        ranks=(2, 4),
        max_steps=20,
        max_eval_examples=48,
    )
    return select_rank(str(model_folder), folder / "data", folder / "run", settings=settings)


ACCURACY = """
import torch
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(model.base_model.config.name_or_path or model.config._name_or_path)
rows = [json.loads(line) for line in open({data!r}, encoding="utf-8")]
batch = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True, truncation=True, max_length=32)
batch.pop("token_type_ids", None)
with torch.no_grad():
    logits = model.eval()(**batch).logits
named = [model.config.id2label[number] for number in logits.argmax(-1).tolist()]
print(sum(name == row["label"] for name, row in zip(named, rows)) / len(rows))
"""


def _read_accuracy(selected: Selected) -> float:
    """Read the accuracy of the exported adapter from the journal."""
    name = Path(selected.answers.adapter.answer.trial_id).name
    lines = map(json.loads, (selected.run / "journal.jsonl").read_text(encoding="utf-8").splitlines())
    record = next(line for line in lines if line["type"] == "trial_finished" and line["trial_id"] == name)
    return float(record["metrics"]["accuracy"])


def test_the_card_s_lines_load_the_classifier_in_a_fresh_python(selected: Selected) -> None:
    folder = selected.adapter.path
    code = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    data = str(selected.run.parent / "data" / "validation.jsonl")
    script = code.replace("this/folder", str(folder)) + ACCURACY.format(data=data)
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) == pytest.approx(_read_accuracy(selected), abs=1e-9)
    assert "0 art, 1 law, 2 news, 3 sport" in (folder / "README.md").read_text(encoding="utf-8")
