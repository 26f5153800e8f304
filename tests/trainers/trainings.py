"""Provide tokenized rows, and a model with an adapter, for the tests of other trainers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from rightrank.trainers.measurement import (
    InMemoryAdapter,
    SmallestAdapterResult,
    TrainingSummary,
    find_smallest_adapter,
)

Rows = list[dict[str, list[int]]]


class RowList(torch.utils.data.Dataset[dict[str, list[int]]]):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def make_peft_model(folder: Path, **changes: Any) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(**{"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "lora_dropout": 0.1} | changes)
    return get_peft_model(base, config)


class OneTimeRows(torch.utils.data.IterableDataset[Any]):
    """Rows that can be read once."""

    def __init__(self, rows: Rows) -> None:
        self.left = iter(rows)

    def __iter__(self) -> Iterator[Any]:
        return self.left


def make_trainer(
    folder: Path,
    rows: Rows,
    out: Path,
    *callbacks: Any,
    model: Any = None,
    train: Any = None,
    held_out: Any = None,
    **changes: Any,
) -> Trainer:
    """Return a trainer of an adapter of rank 16. Callbacks are classes, or functions of the trainer such as `partial(SmallestAdapter, margin=1.0)`."""
    settings: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "seed": 0}
    settings |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = Trainer(
        make_peft_model(folder) if model is None else model,
        TrainingArguments(output_dir=str(out), **settings | changes),
        DataCollatorForSeq2Seq(tokenizer, padding=True),
        RowList(rows[:140]) if train is None else train,
        RowList(rows[140:]) if held_out is None else held_out,
        processing_class=tokenizer,
    )
    for make_callback in callbacks:
        trainer.add_callback(make_callback(trainer))
    return trainer


def run_training(folder: Path, rows: Rows, out: Path, *callbacks: Any, **changes: Any) -> Any:
    """Train and return the first callback, or the trainer if there is none."""
    trainer = make_trainer(folder, rows, out, *callbacks, **changes)
    added = trainer.callback_handler.callbacks[-len(callbacks) :] if callbacks else [trainer]
    trainer.train()
    return added[0]


def make_batches(rows: Rows) -> list[dict[str, torch.Tensor]]:
    return [{key: torch.tensor([value]) for key, value in row.items()} for row in rows]


def list_messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings of the package."""
    return [r.getMessage() for r in caplog.records if r.name == "rightrank" and r.levelname == "WARNING"]


def measure(
    model: Any, held_out: list[Any], train: list[Any], out: Path, margin: float = 1.0, **changes: Any
) -> SmallestAdapterResult:
    """Measure the truncations of a model's adapter."""
    return find_smallest_adapter(
        InMemoryAdapter(model, held_out, train, **changes), out, TrainingSummary(), margin=margin
    )


def read_answer(out: Path) -> dict[str, Any]:
    """Return the answer that a training in `out` has written beside the adapter."""
    folder = out / "rightrank"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "answer.json", "report.html"]
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    return answer
