"""Select a rank for classification with PEFT. Accuracy decides, and ranks are compared example by example.

python examples/peft_classification.py --model path/to/model --data data.jsonl     (rows of text and label)
"""

from __future__ import annotations

import random

import torch
from common import parse_options, read_rows
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding

from rightrank import TrialResult, TrialTask, select_rank_with

arguments = parse_options()
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
rows = read_rows(arguments.data)
classes = sorted({str(row["label"]) for row in rows})
held_out, training = rows[: arguments.held_out], rows[arguments.held_out :]


def build_batch(rows: list[dict[str, str]]) -> BatchEncoding:
    batch = tokenizer([row["text"] for row in rows], padding=True, truncation=True, max_length=128, return_tensors="pt")
    batch["labels"] = torch.tensor([classes.index(str(row["label"])) for row in rows])
    return batch


@torch.no_grad()
def score_held_out(model: PeftModel) -> list[float]:
    """Return 1 or 0 for every held-out example, in order."""
    model.eval()
    correct: list[float] = []
    for start in range(0, len(held_out), 16):
        batch = build_batch(held_out[start : start + 16])
        correct += (model(**batch).logits.argmax(-1) == batch["labels"]).float().tolist()
    return correct


def train(task: TrialTask) -> TrialResult:
    torch.manual_seed(0)  # so that the new classification head is the same for every rank
    base = AutoModelForSequenceClassification.from_pretrained(
        arguments.model, num_labels=len(classes), pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(task.seed)
    config = LoraConfig(r=task.rank, lora_alpha=int(task.lora_alpha), target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=task.learning_rate)
    order = random.Random(task.seed)  # the same batches for every rank
    for _ in range(task.steps):
        model(**build_batch(order.sample(training, 16))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    correct = score_held_out(model)
    model.save_pretrained(task.folder)
    return TrialResult(metrics={"accuracy": sum(correct) / len(correct)}, example_scores=correct)


if __name__ == "__main__":
    selected = select_rank_with(
        train,
        arguments.out,
        ranks=(1, 4, 16),
        learning_rates=(1e-3, 3e-3),
        max_steps=arguments.steps,
        metric="accuracy",
        margin=0.02,
    )
    print(selected.decision.sentence)
