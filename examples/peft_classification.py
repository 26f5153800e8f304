"""A PEFT script for classification. Accuracy decides, and ranks are compared example by example.

python examples/peft_classification.py --model path/to/model --data data.jsonl     (rows of text and label)
"""

from __future__ import annotations

import random

import torch
from common import options, rows_of
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding

from rightrank import TrialResult, TrialTask, select_rank_with

arguments = options()
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
rows = rows_of(arguments.data)
classes = sorted({str(row["label"]) for row in rows})
held_out, training = rows[: arguments.held_out], rows[arguments.held_out :]


def batch_of(some: list[dict[str, str]]) -> BatchEncoding:
    batch = tokenizer([row["text"] for row in some], padding=True, truncation=True, max_length=128, return_tensors="pt")
    batch["labels"] = torch.tensor([classes.index(str(row["label"])) for row in some])
    return batch


@torch.no_grad()
def right_answers(model: PeftModel) -> list[float]:
    """1 or 0 for every held-out example, in order."""
    model.eval()
    right: list[float] = []
    for start in range(0, len(held_out), 16):
        batch = batch_of(held_out[start : start + 16])
        right += (model(**batch).logits.argmax(-1) == batch["labels"]).float().tolist()
    return right


def train(task: TrialTask) -> TrialResult:
    torch.manual_seed(0)  # of the new classification head: the same for every rank
    base = AutoModelForSequenceClassification.from_pretrained(
        arguments.model, num_labels=len(classes), pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(task.seed)
    config = LoraConfig(r=task.rank, lora_alpha=int(task.lora_alpha), target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=task.learning_rate)
    order = random.Random(task.seed)  # the same batches for every rank
    for _ in range(task.steps):
        model(**batch_of(order.sample(training, 16))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    right = right_answers(model)
    model.save_pretrained(task.folder)
    return TrialResult(metrics={"accuracy": sum(right) / len(right)}, item_scores=right)


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
