"""TRL's `DPOTrainer`. Each held-out pair is an example, scored by the log-likelihood of its chosen answer minus that of its rejected one.

python examples/trl_dpo.py --model path/to/model --data pairs.jsonl     (rows of prompt, chosen and rejected)
"""

from __future__ import annotations

import torch
from common import options, rows_of, tokenised
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from rightrank import TrialResult, TrialTask, select_rank_with
from rightrank.integrations import causal_item_losses, padded_batches

arguments = options()
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
rows = rows_of(arguments.data)
held_out, training = rows[: arguments.held_out], Dataset.from_list(rows[arguments.held_out :])
sides = {
    side: tokenised(tokenizer, [{"prompt": row["prompt"], "completion": row[side]} for row in held_out])
    for side in ("chosen", "rejected")
}


def log_likelihoods(model: torch.nn.Module, side: str) -> list[float]:
    items = causal_item_losses(model, padded_batches(sides[side], tokenizer.pad_token_id, 16))
    return [-loss * tokens for loss, tokens in zip(items.scores, items.weights, strict=True)]


def train(task: TrialTask) -> TrialResult:
    settings = DPOConfig(
        output_dir=str(task.folder / "trainer"),
        learning_rate=task.learning_rate,
        max_steps=task.steps,
        seed=task.seed,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(arguments.model),
        args=settings,
        train_dataset=training,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=task.rank, lora_alpha=int(task.lora_alpha), target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    chosen, rejected = (log_likelihoods(trainer.model, side) for side in ("chosen", "rejected"))
    margins = [good - bad for good, bad in zip(chosen, rejected, strict=True)]
    trainer.model.save_pretrained(task.folder)
    return TrialResult(metrics={"reward_margin": sum(margins) / len(margins)}, item_scores=margins)


if __name__ == "__main__":
    selected = select_rank_with(
        train,
        arguments.out,
        ranks=(1, 4, 16),
        learning_rates=(1e-4, 1e-3),
        steps=arguments.steps,
        metric="reward_margin",
    )
    print(selected.decision.sentence)
