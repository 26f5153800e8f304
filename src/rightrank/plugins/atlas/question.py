"""What is known before a training, as a question to the atlas: from a model's name or folder, from data on disk, from a run's records."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from rightrank.plugins.atlas.estimate import Question
from rightrank.plugins.atlas.rows import FAMILIES
from rightrank.schema.errors import SettingsError
from rightrank.schema.events import RunStarted

SIZE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)\s*([bBmM])(?![a-zA-Z0-9])")
KNOWN = {  # bases whose names have no size
    "distilbert": 67e6, "bert-base": 110e6, "bert-large": 335e6, "roberta-base": 125e6, "roberta-large": 355e6, "distilgpt2": 82e6,
    "gpt2": 124e6, "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1.56e9, "t5-small": 60e6, "t5-base": 223e6, "vit-base": 86e6,
}  # fmt: skip
FEW = 200  # rows that are read for the length and the columns
LETTERS_A_TOKEN = 4  # of English text, about


def ask(
    model: str | None,
    data: str | Path | None,
    task: str | None,
    parameters: float | None,
    rows: int | None,
    tokens: float | None,
    metric: str | None,
    margin: float | None,
) -> tuple[Question, list[str]]:
    """The question, and what could not be used of it.

    Raises:
        SettingsError: a number that can't be.
    """
    for name, value in (("parameters", parameters), ("rows", rows), ("tokens", tokens), ("margin", margin)):
        if value is not None and not value > 0:
            raise SettingsError(f"{name} is {value:g}; give a number above 0")
    question = Question(margin=margin)
    notes: list[str] = []
    if data is not None:
        question = replace(_of_data(Path(data)), margin=margin)
        notes += [] if question.rows else [f"{data}: neither .jsonl nor .csv, so its rows are not counted; give --rows"]
    if model is not None and parameters is None:
        parameters = size_of(model)
        notes += [] if parameters else [f"{model}: its size is not known; give --parameters"]
    if task is not None and task not in FAMILIES:
        notes.append(f"{task!r} is no task family of the atlas, and is not used: {', '.join(FAMILIES)}")
        task = None
    given: dict[str, Any] = {
        "family": task,
        "parameters": parameters,
        "rows": rows,
        "tokens": tokens,
        "kind": kind_of(metric),
    }
    return replace(question, **{name: value for name, value in given.items() if value is not None}), notes


def kind_of(metric: str | None) -> str | None:
    """The atlas's kind of a metric: loss, accuracy (shares of answers that are right), or other."""
    if metric is None:
        return None
    if "loss" in metric or metric == "nll":
        return "loss"
    shares = ("acc", "f1", "exact", "match", "pass", "auroc", "jaccard")
    return "accuracy" if any(share in metric.lower() for share in shares) else "other"


def size_of(model: str) -> float | None:
    """Parameters of a base: from the weights of a folder, else from its name; None where neither tells."""
    folder = Path(model)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    if weights:
        return weights / (4 if _config(folder).get("torch_dtype", _config(folder).get("dtype")) == "float32" else 2)
    name = model.rstrip("/").split("/")[-1].lower()
    if found := SIZE.findall(name):
        return max(float(number) * (1e9 if letter in "bB" else 1e6) for number, letter in found)
    known = [size for base, size in sorted(KNOWN.items(), key=lambda item: len(item[0])) if base in name]
    return known[-1] if known else None


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _of_data(path: Path) -> Question:
    """Rows, tokens and family of a file of rows, from its first rows and its size.

    Raises:
        SettingsError: the file can't be read.
    """
    if not path.exists():
        raise SettingsError(f"{path} does not exist; give a file of rows, or leave DATA out and give --rows")
    if path.suffix not in (".jsonl", ".csv"):
        return Question()
    try:
        with path.open(encoding="utf-8") as lines:
            first = [line for line in islice(lines, FEW) if line.strip()]
        whole = path.stat().st_size
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {error}; give a file of rows that can be read") from None
    length = sum(len(line.encode()) for line in first) / max(1, len(first))
    rows = len(first) if len(first) < FEW else round(whole / length)
    columns = set(next(csv.reader(first), [])) if path.suffix == ".csv" else _keys(first)
    family = "classification" if "label" in columns else None if "chosen" in columns else "language"
    return Question(family=family, rows=rows or None, tokens=whole / LETTERS_A_TOKEN or None)


def _keys(lines: list[str]) -> set[str]:
    try:
        record = json.loads(lines[0]) if lines else {}
    except ValueError:
        return set()
    return set(record) if isinstance(record, dict) else set()


def of_run(started: RunStarted) -> Question:
    """What a run's first record says: nothing of its trainings."""
    train = started.data.splits.get("train")
    margin = started.settings.get("margin")
    return Question(
        family="classification" if started.data.form == "classification" else "language",
        rows=train.items if train else None,
        tokens=train.tokens if train else None,
        kind=kind_of(started.metric),
        margin=float(margin) if isinstance(margin, (int, float)) else None,
    )
