"""Select a rank with a plain PEFT training loop, the smallest trainer for `select_rank_with`.

python examples/plain_loop.py --model path/to/model --data data.jsonl     (rows of prompt and completion)
"""

from __future__ import annotations

import random

import torch
from common import build_batches, parse_options, read_rows, tokenize_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rightrank import TrialResult, TrialTask, select_rank_with
from rightrank.trainers.custom_trainer import causal_example_losses

arguments = parse_options()
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
rows = tokenize_rows(tokenizer, read_rows(arguments.data))
held_out, training = rows[: arguments.held_out], rows[arguments.held_out :]


def train(task: TrialTask) -> TrialResult:
    torch.manual_seed(task.seed)
    base = AutoModelForCausalLM.from_pretrained(arguments.model)
    config = LoraConfig(
        r=task.rank, lora_alpha=int(task.lora_alpha), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=task.learning_rate)
    order = random.Random(task.seed)  # the same batches for every rank
    for _ in range(task.steps):
        batch = build_batches(tokenizer, order.sample(training, 8), 8)[0]
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(task.folder)
    return causal_example_losses(model, build_batches(tokenizer, held_out, 16))


if __name__ == "__main__":
    selected = select_rank_with(
        train, arguments.out, ranks=(1, 4, 16), learning_rates=(1e-3, 3e-3), max_steps=arguments.steps
    )
    print(selected.decision.sentence)
    print("adapter:", selected.adapter and selected.adapter.path)
