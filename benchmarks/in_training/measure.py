"""`SmallestAdapter` at the end of a real TRL training: the rank found, its loss on unseen examples by plain PEFT, and what the end cost.

python -m benchmarks.in_training.measure --rank 32 --steps 400 --work FOLDER

SmolLM2-135M-Instruct learns to write docstrings of the standard library: LoRA on all linear layers of the last two blocks. Three splits: training,
held-out examples for the callback, unseen ones for the check, which loads both adapters with PEFT and uses nothing of the package.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks.machine import machine
from rightrank.demo import prepare_docstrings, prepare_model_folder
from rightrank.interop.smallest import SmallestAdapter

HERE = Path(__file__).parent
HELD_OUT, UNSEEN, LENGTH = 300, 300, 128
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--margin", type=float, default=0.005)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    model = prepare_model_folder(given.work / "base_model", print)
    rows = [
        json.loads(line) for line in prepare_docstrings(given.work / "docstrings.jsonl").read_text("utf-8").splitlines()
    ]
    random.Random(0).shuffle(rows)
    found = trained(model, rows, given)
    check = rows[HELD_OUT : HELD_OUT + UNSEEN]
    losses = [by_peft(model, given.work / name, check) for name in ("trained", "outputs/rightrank/adapter")]
    found["unseen"] = paired(*losses)
    print(json.dumps(found, indent=1))
    stored = HERE / "results.jsonl"
    with stored.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"machine": machine(), **found}) + "\n")


def trained(model: Path, rows: list[dict[str, str]], given: argparse.Namespace) -> dict[str, Any]:
    """Train with TRL; what the callback found and took."""
    torch.manual_seed(given.seed)
    pairs = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    settings = SFTConfig(
        output_dir=str(given.work / "outputs"),
        max_steps=given.steps,
        learning_rate=given.learning_rate,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        max_length=LENGTH,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=given.seed,
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(pairs[HELD_OUT + UNSEEN :]),
        eval_dataset=Dataset.from_list(pairs[:HELD_OUT]),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(
            r=given.rank,
            lora_alpha=32,
            target_modules=LINEAR,
            layers_to_transform=[28, 29],
            task_type="CAUSAL_LM",
        ),
    )
    callback = SmallestAdapter(trainer.eval_dataset, margin=given.margin)
    trainer.add_callback(callback)
    started = time.monotonic()
    trainer.train()
    whole = time.monotonic() - started
    trainer.model.save_pretrained(given.work / "trained")
    assert callback.result is not None
    answer, seconds = callback.result.answer, callback.result.seconds
    return {
        "trainer": "TRL SFTTrainer",
        "task": "docstrings",
        "trained_rank": given.rank,
        "steps": given.steps,
        "seed": given.seed,
        "margin": given.margin,
        "rank": answer.rank,
        "difference": answer.difference,
        "difference_high": answer.difference_high,
        "candidates": {one.rank: [one.difference, one.difference_high] for one in answer.candidates},
        "training_seconds": whole - seconds,
        "end_seconds": seconds,
        "end_share": seconds / (whole - seconds),
    }


@torch.no_grad()
def by_peft(model: Path, adapter: Path, rows: list[dict[str, str]]) -> list[tuple[float, int]]:
    """`(summed loss, tokens)` of each row's completion, one by one."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter).eval()
    found = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"][:LENGTH]
        labels = torch.tensor([[-100] * min(len(prompt), len(ids)) + ids[len(prompt) :]])
        tokens = int((labels[:, 1:] != -100).sum())
        if tokens:
            loss = float(loaded(input_ids=torch.tensor([ids]), labels=labels).loss)
            found.append((loss * tokens, tokens))
    return found


def paired(before: list[tuple[float, int]], after: list[tuple[float, int]]) -> dict[str, float]:
    """The mean difference a token, after minus before, and 1.645 standard errors of it over examples."""
    weights = torch.tensor([tokens for _, tokens in before], dtype=torch.float64)
    difference = torch.tensor([b[0] - a[0] for a, b in zip(before, after, strict=True)], dtype=torch.float64)
    mean = float(difference.sum() / weights.sum())
    error = float(((difference - weights * mean) / weights.mean()).std()) / len(weights) ** 0.5
    return {"difference": mean, "high": mean + 1.645 * error, "examples": len(weights)}


if __name__ == "__main__":
    main()
