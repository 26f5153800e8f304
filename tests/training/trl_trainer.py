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
from rightrank.training.runtime import Runtime
from rightrank.training.targets import make_lora_config


class LossRecorder(trl.DPOTrainer):  # type: ignore[misc] # untyped
    """A callback that appends the loss of each training step to `losses`."""

    losses: list[float]

    def compute_loss(self, *arguments: Any, **named: Any) -> Any:
        loss = super().compute_loss(*arguments, **named)
        if self.model.training:
            self.losses.append(float(loss.detach()))
        return loss


def make_trainer(
    runtime: Runtime,
    arm: Arm,
    model: str | Path,
    data: Path,
    folder: Path,
) -> LossRecorder:
    """Make a trainer of `arm` on the pairs in `data`; it can evaluate the validation split."""
    settings = runtime.settings
    splits = load_data(data, settings)
    content = {
        data_example.example_id: dict(data_example.content)
        for split in ("train", "validation")
        for data_example in splits.examples[split]
    }
    order = [runtime.data.splits["train"][index] for batch in runtime.plan_batches(arm.seed) for index in batch]
    held_out = [content[example.example_id] for example in runtime.data.splits["validation"]]
    trainer = LossRecorder(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=trl.DPOConfig(
            output_dir=str(folder),
            beta=settings.beta,
            max_length=settings.seq_len,
            learning_rate=arm.learning_rate,
            max_steps=arm.steps,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.max_eval_examples,
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
        train_dataset=Dataset.from_list([content[example.example_id] for example in order]),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=make_lora_config(settings, arm, False, runtime.targets.names),
    )
    trainer.losses = []
    return trainer
