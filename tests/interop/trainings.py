"""What the tests of others' trainings share: tokenized rows, and a model with an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

Rows = list[dict[str, list[int]]]


class Listed(torch.utils.data.Dataset[dict[str, list[int]]]):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def peft_model(folder: Path, **changes: Any) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(**{"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "lora_dropout": 0.1} | changes)
    return get_peft_model(base, config)


class OneShot(torch.utils.data.IterableDataset[Any]):
    """Rows that can be read once."""

    def __init__(self, rows: Rows) -> None:
        self.left = iter(rows)

    def __iter__(self) -> Iterator[Any]:
        return self.left


def trained(folder: Path, rows: Rows, out: Path, callbacks: Sequence[Any], **changes: Any) -> tuple[Trainer, Any]:
    model = peft_model(folder)
    settings: dict[str, Any] = {"max_steps": 60, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "seed": 0}
    settings |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(out), **settings | changes)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = Trainer(model, arguments, collator, Listed(rows[:140]), Listed(rows[140:]), callbacks=list(callbacks))
    trainer.train()
    return trainer, model
