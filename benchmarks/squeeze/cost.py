"""What `Squeeze` costs and gives in a classifier's training with transformers' `Trainer`, beside the same training at the top and at the low rank.

    python -m benchmarks.squeeze.cost BASE DATA --out benchmarks/squeeze/cost.json [--steps 300]

DATA has rows `text, label`. Each training runs in this process, one after the other, on one thread. Losses are PEFT's, of the saved adapters on rows that no
training saw. State is what the adapter's training holds: parameters, gradients and the optimizer's state.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from benchmarks.machine import machine
from rightrank import Squeeze

TOP, LOW, HELD_OUT, LENGTH = 64, 4, 2000, 24
WAYS: dict[str, dict[str, Any]] = {
    "top": {"rank": TOP},
    "low": {"rank": LOW},
    "squeeze, rank given": {"rank": TOP, "squeeze": {"rank": LOW, "at": 0.5}},
    "squeeze, margin": {"rank": TOP, "squeeze": {"margin": 0.05, "at": 0.5}},
}


def rows_of(data: Path, tokenizer: Any) -> tuple[list[dict[str, Any]], int]:
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    labels = sorted({row["label"] for row in rows})
    order = np.random.default_rng(0).permutation(len(rows))
    encoded = tokenizer([rows[number]["text"] for number in order], truncation=True, max_length=LENGTH)
    numbers = [labels.index(rows[number]["label"]) for number in order]
    return [{"input_ids": ids, "labels": label} for ids, label in zip(encoded["input_ids"], numbers, strict=True)], len(
        labels
    )


def base_of(name: str, classes: int) -> Any:
    torch.manual_seed(0)  # of the head
    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=classes)


def state_bytes(trainer: Trainer) -> int:
    """Of the parameters, their gradients and the optimizer's state."""
    trained = [one for one in trainer.model.parameters() if one.requires_grad]
    optimizer: Any = trainer.optimizer
    states = [part for one in trained for part in optimizer.state[one].values() if torch.is_tensor(part)]
    return 2 * sum(one.nbytes for one in trained) + sum(one.nbytes for one in states)


def train(name: str, rows: list[dict[str, Any]], classes: int, way: dict[str, Any], steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    config = LoraConfig(
        r=way["rank"], lora_alpha=32, target_modules=["query", "key", "value", "dense"], task_type=TaskType.SEQ_CLS
    )
    model: Any = get_peft_model(base_of(name, classes), config)
    callback = Squeeze(**way["squeeze"]) if "squeeze" in way else None
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, learning_rate=3e-3, per_device_train_batch_size=8, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0
        )  # fmt: skip
        collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(name))
        train_rows: Any = rows[2 * HELD_OUT :]
        trainer = Trainer(
            model,
            arguments,
            train_dataset=train_rows,
            eval_dataset=rows[HELD_OUT : 2 * HELD_OUT],
            data_collator=collator,
            callbacks=[callback] if callback else [],
        )  # type: ignore[arg-type]
        began, wall = time.process_time(), time.perf_counter()
        trainer.train()
        seconds = time.process_time() - began
        model.save_pretrained(f"{folder}/adapter")
        loaded = PeftModel.from_pretrained(base_of(name, classes), f"{folder}/adapter").eval()
        losses = losses_of(loaded, rows[:HELD_OUT], collator)
        cut = None if callback is None or callback.cut is None else callback.cut.rank
        found = {
            "rank": cut or way["rank"],
            "processor_seconds": round(seconds, 1),
            "wall_seconds": round(time.perf_counter() - wall, 1),
        }
        return found | {"state_bytes": state_bytes(trainer), "loss": round(float(losses.mean()), 4), "losses": losses}


@torch.no_grad()
def losses_of(model: Any, rows: list[dict[str, Any]], collator: Any) -> np.ndarray:
    found = []
    for start in range(0, len(rows), 64):
        batch = collator(rows[start : start + 64])
        labels = batch.pop("labels")
        found.append(torch.nn.functional.cross_entropy(model(**batch).logits, labels, reduction="none"))
    return torch.cat(found).double().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("rightrank").setLevel(logging.ERROR)
    rows, classes = rows_of(options.data, AutoTokenizer.from_pretrained(options.base))
    train(options.base, rows, classes, WAYS["low"], 5)  # what the first training alone takes
    found = {key: train(options.base, rows, classes, way, options.steps) for key, way in WAYS.items()}
    top = found["top"].pop("losses")
    for key, values in found.items():
        if key != "top":
            deltas = values.pop("losses") - top
            values |= {
                "difference": round(float(deltas.mean()), 4),
                "error": round(float(deltas.std(ddof=1) / np.sqrt(len(deltas))), 4),
            }
    document = {
        "base": Path(options.base).name,
        "data": options.data.stem,
        "steps": options.steps,
        "examples": HELD_OUT,
        "machine": machine(),
        "trainings": found,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
