"""`SmallestAdapter` at the end of a real training: the rank found, its loss on unseen examples by plain PEFT, and what the end cost.

python -m benchmarks.in_training.measure --task language --model FOLDER --data rows.jsonl --rank 32 --work FOLDER

Three tasks, each with its usual trainer: `language` (TRL's SFTTrainer, rows of prompt and completion), `pairs` (TRL's DPOTrainer, rows of
prompt, chosen and rejected) and `classes` (transformers' Trainer, rows of text and label). LoRA on all linear layers of the last blocks.
Three splits: training, held-out examples for the callback, unseen ones for the check, which loads both adapters with PEFT and uses nothing
of the package. The base, the trained adapter and the unseen rows stay in the work folder.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.machine import machine
from rightrank import SmallestAdapter
from rightrank.decision.records import records_of
from rightrank.runs.folder import RunFolder

HERE = Path(__file__).parent
BETA = 0.1
Row = dict[str, Any]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "query", "key", "value", "dense"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(TRAINERS), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=2, help="how many of the last blocks are adapted")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--unseen", type=int, default=500)
    parser.add_argument("--margin", type=float)
    parser.add_argument("--metric", default="loss")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.data.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    found = trained(rows, given)
    unseen = rows[given.held_out : given.held_out + given.unseen]
    score = SCORES[given.task](given, rows)
    run = given.work / "outputs" / "rightrank"
    handed_over = json.loads((run / "decision.json").read_text(encoding="utf-8"))["handed_over"]
    sides = [score(run / name, unseen) for name in (handed_over["reference_adapter"], "adapter")]
    found["unseen"] = paired(*sides)
    with given.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found | {"machine": machine()}) + "\n")
    print(json.dumps(found, indent=1))


class Processor(TrainerCallback):
    """Processor seconds of this process, which other jobs on the machine do not change."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begin = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.last_step = time.process_time()

    def seconds(self) -> dict[str, float]:
        """Of the training, and of all that came after its last step."""
        end = time.process_time() - self.last_step
        return {"training": round(self.last_step - self.begin, 2), "end": round(end, 2)}


def trained(rows: Sequence[Row], given: argparse.Namespace) -> dict[str, Any]:
    """Train; what the callback found and took."""
    torch.manual_seed(given.seed)
    train, held_out = list(rows[given.held_out + given.unseen :]), list(rows[: given.held_out])
    trainer = TRAINERS[given.task](train, held_out, given)
    callback = SmallestAdapter(trainer.eval_dataset, margin=given.margin, metric=given.metric)
    processor = Processor()
    trainer.add_callback(callback)
    trainer.add_callback(processor)
    trainer.train()
    processor_seconds = processor.seconds()
    assert callback.result is not None
    answer = callback.result.answer
    return {
        "trainer": f"{'TRL' if given.task != 'classes' else 'transformers'} {type(trainer).__name__}",
        "task": given.task,
        "data": given.data.stem,
        "data_sha256": sha256(given.data.read_bytes()).hexdigest(),
        "model": json.loads((given.model / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
        or given.model.name,
        "trained_rank": given.rank,
        "blocks": given.blocks,
        "steps": given.steps,
        "batch_size": given.batch_size,
        "learning_rate": given.learning_rate,
        "seed": given.seed,
        "metric": given.metric,
        "margin": answer.margin,
        "rank": answer.rank,
        "difference": answer.difference,
        "difference_high": answer.difference_high,
        "candidates": {one.rank: [one.value, one.difference, one.difference_high] for one in answer.candidates},
        "notes": answer.notes,
        "cost": cost_of(given.work / "outputs" / "rightrank"),
        "processor_seconds": processor_seconds,
    }


def cost_of(run: Path) -> dict[str, Any]:
    """Seconds and examples of the end in a run folder, and its share of the training's time."""
    trials = records_of(RunFolder(run).journal.read(), str(run)).finished()
    trained = next(trial for trial in trials if trial.truncate_from is None)
    seconds, training = sum(trial.eval_seconds for trial in trials), trained.train_seconds
    return {
        "seconds": round(seconds, 2),
        "training_seconds": round(training, 2) or None,
        "share": round(seconds / training, 4) if training else None,
        "training_peak_bytes": trained.peak_bytes,
        "examples": len(trained.item_losses),
    }


def _lora(given: argparse.Namespace, base: Any, task: str) -> LoraConfig:
    count = base.config.num_hidden_layers
    last = list(range(count - given.blocks, count))
    return LoraConfig(
        r=given.rank, lora_alpha=32, target_modules=LINEAR, layers_to_transform=last, task_type=task
    )  # fmt: skip


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": str(given.work / "outputs"),
        "max_steps": given.steps,
        "learning_rate": given.learning_rate,
        "per_device_train_batch_size": given.batch_size,
        "per_device_eval_batch_size": given.batch_size,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": given.seed,
        "logging_steps": 50,
    }


def language_trainer(train: list[Row], held_out: list[Row], given: argparse.Namespace) -> Any:
    from trl import SFTConfig, SFTTrainer  # an older TRL beside another trainer may lack it

    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    return SFTTrainer(
        base,
        args=SFTConfig(**_settings(given), max_length=given.length),
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=AutoTokenizer.from_pretrained(given.model),
        peft_config=_lora(given, base, "CAUSAL_LM"),
    )


def pair_trainer(train: list[Row], held_out: list[Row], given: argparse.Namespace) -> Any:
    from trl import DPOConfig, DPOTrainer

    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    return DPOTrainer(
        base,
        args=DPOConfig(**_settings(given), max_length=given.length, beta=BETA),
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=AutoTokenizer.from_pretrained(given.model),
        peft_config=_lora(given, base, "CAUSAL_LM"),
    )


def class_trainer(train: list[Row], held_out: list[Row], given: argparse.Namespace) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    classes = sorted({row["label"] for row in train})
    base = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=len(classes))

    def encoded(rows: list[Row]) -> list[Row]:
        known = [row for row in rows if row["label"] in classes]
        return [
            {**tokenizer(row["text"], truncation=True, max_length=given.length), "label": classes.index(row["label"])}
            for row in known
        ]

    from peft import get_peft_model

    model: Any = get_peft_model(base, _lora(given, base, "SEQ_CLS"))
    arguments = TrainingArguments(**_settings(given))
    return Trainer(model, arguments, DataCollatorWithPadding(tokenizer), encoded(train), encoded(held_out))  # type: ignore[arg-type]


TRAINERS: dict[str, Callable[[list[Row], list[Row], argparse.Namespace], Any]] = {
    "language": language_trainer,
    "pairs": pair_trainer,
    "classes": class_trainer,
}

Score = Callable[[Path, Sequence[Row]], list[tuple[float, float]]]  # (score times weight, weight) of each row


def language_score(given: argparse.Namespace, _: Sequence[Row]) -> Score:
    tokenizer = AutoTokenizer.from_pretrained(given.model)

    @torch.no_grad()
    def score(adapter: Path, rows: Sequence[Row]) -> list[tuple[float, float]]:
        base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, adapter).eval()
        found = []
        for row in rows:
            logps, tokens = _logps(loaded, tokenizer, row["prompt"], row["completion"], given.length)
            if tokens:
                found.append((-logps, float(tokens)))
        return found

    return score


def pair_score(given: argparse.Namespace, _: Sequence[Row]) -> Score:
    tokenizer = AutoTokenizer.from_pretrained(given.model)

    @torch.no_grad()
    def score(adapter: Path, rows: Sequence[Row]) -> list[tuple[float, float]]:
        base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, adapter).eval()

        def ratio(row: Row) -> float:
            chosen, rejected = (
                _logps(loaded, tokenizer, row["prompt"], row[side], given.length)[0] for side in ("chosen", "rejected")
            )
            return chosen - rejected

        found = []
        for row in rows:
            with loaded.disable_adapter():
                reference = ratio(row)
            found.append((float(-F.logsigmoid(torch.tensor(BETA * (ratio(row) - reference)))), 1.0))
        return found

    return score


def _logps(model: Any, tokenizer: Any, prompt: str, answer: str, length: int) -> tuple[float, int]:
    begin = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"][:length]
    labels = torch.tensor([[-100] * min(begin, len(ids)) + ids[begin:]])
    tokens = int((labels[:, 1:] != -100).sum())
    return (-float(model(input_ids=torch.tensor([ids]), labels=labels).loss) * tokens if tokens else 0.0), tokens


def class_score(given: argparse.Namespace, rows: Sequence[Row]) -> Score:
    classes = sorted({row["label"] for row in rows[given.held_out + given.unseen :]})
    tokenizer = AutoTokenizer.from_pretrained(given.model)

    @torch.no_grad()
    def score(adapter: Path, unseen: Sequence[Row]) -> list[tuple[float, float]]:
        base = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=len(classes))
        loaded = PeftModel.from_pretrained(base, adapter).eval()
        found = []
        for row in unseen:
            logits = loaded(
                **tokenizer(row["text"], truncation=True, max_length=given.length, return_tensors="pt")
            ).logits
            label = torch.tensor([classes.index(row["label"])])
            loss, wrong = float(F.cross_entropy(logits, label)), float(logits.argmax(-1) != label)
            found.append((wrong if given.metric == "accuracy" else loss, 1.0))
        return found

    return score


SCORES: dict[str, Callable[[argparse.Namespace, Sequence[Row]], Score]] = {
    "language": language_score,
    "pairs": pair_score,
    "classes": class_score,
}


def paired(before: Sequence[tuple[float, float]], after: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The mean difference, after minus before, with its two-sided 95% interval over examples."""
    weights = torch.tensor([weight for _, weight in before], dtype=torch.float64)
    difference = torch.tensor([b[0] - a[0] for a, b in zip(before, after, strict=True)], dtype=torch.float64)
    mean = float(difference.sum() / weights.sum())
    error = float(((difference - weights * mean) / weights.mean()).std()) / len(weights) ** 0.5
    value = sum(score for score, _ in before) / float(weights.sum())
    return {
        "value": value,
        "difference": mean,
        "low": mean - 1.96 * error,
        "high": mean + 1.96 * error,
        "examples": len(weights),
    }


if __name__ == "__main__":
    main()
