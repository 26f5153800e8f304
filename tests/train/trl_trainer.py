"""TRL's `DPOTrainer` over the batches of a runtime, in their order, with a record of every step's loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from rightrank.data.splits import load_data
from rightrank.schema.trials import Arm
from rightrank.train.runtime import Runtime
from rightrank.train.targets import lora_config


class Recording(trl.DPOTrainer):  # type: ignore[misc] # untyped
    """Appends the loss of each training step to `losses`."""

    losses: list[float]

    def compute_loss(self, *arguments: Any, **named: Any) -> Any:
        found = super().compute_loss(*arguments, **named)
        if self.model.training:
            self.losses.append(float(found.detach()))
        return found


def trainer_over(
    runtime: Runtime,
    arm: Arm,
    model: str | Path,
    data: Path,
    folder: Path,
) -> Recording:
    """A trainer of `arm` on the pairs in `data`; it can evaluate the validation split."""
    settings = runtime.settings
    splits = load_data(data, settings)
    content = {one.item_id: dict(one.content) for split in ("train", "selection") for one in splits.examples[split]}
    order = [runtime.data.splits["train"][index] for batch in runtime.batch_plan(arm.seed) for index in batch]
    held_out = [content[example.item_id] for example in runtime.data.splits["selection"]]
    trainer = Recording(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=trl.DPOConfig(
            output_dir=str(folder),
            beta=settings.beta,
            max_length=settings.seq_len,
            learning_rate=arm.learning_rate,
            max_steps=arm.steps,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.eval_items,
            train_sampling_strategy="sequential",
            lr_scheduler_type="linear",
            warmup_steps=math.ceil(settings.warmup_ratio * arm.steps),
            max_grad_norm=settings.max_grad_norm,
            gradient_checkpointing=False,
            disable_dropout=True,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([content[example.item_id] for example in order]),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=lora_config(settings, arm, False, runtime.targets.names),
    )
    trainer.losses = []
    return trainer
