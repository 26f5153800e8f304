"""Train with a plain PEFT loop from the first values of an arm; the suite compares the engine with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from rightrank.evaluation.peft_models import ADAPTER, find_lora_modules, suppress_peft_warnings
from rightrank.schema.trials import Arm
from rightrank.training.multi_lora import MultiLora
from rightrank.training.optimizer import make_schedule
from rightrank.training.runtime import Runtime


@contextmanager
def build_fresh_adapter(runtime: Runtime, arm: Arm) -> Iterator[Any]:
    """Yield the PeftModel of a freshly initialised arm in training mode, with PEFT's own forward pass."""
    with MultiLora(runtime.model, runtime.settings) as multi_lora:
        multi_lora.add(ADAPTER, arm, runtime.make_config(arm))
        for module in multi_lora.peft_model.modules():
            if isinstance(module, LoraLayer | ModulesToSaveWrapper):
                del vars(module)["forward"]  # the mode of several adapters
        for module in find_lora_modules(multi_lora.peft_model).values():
            module.training = True  # DoRA uses it before dropout
            module.lora_dropout.train()
        with runtime.use_gradient_checkpointing():
            yield multi_lora.peft_model


def list_trainable_parameters(peft_model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}


def set_first_values(runtime: Runtime, arm: Arm, peft_model: Any) -> dict[str, torch.nn.Parameter]:
    """Set another PEFT model's trainable parameters to an arm's initial values, and return them by name."""
    with build_fresh_adapter(runtime, arm) as ours:
        initial = {name: value.detach().clone() for name, value in list_trainable_parameters(ours).items()}
    named = {name: value for name, value in peft_model.named_parameters() if value.requires_grad}
    assert named.keys() == initial.keys()
    with torch.no_grad():
        for name, value in named.items():
            value.copy_(initial[name])
    return named


def train_plain_loop(runtime: Runtime, arm: Arm) -> list[float]:
    """Train with a plain loop: PEFT's model and forward pass, the model's own loss, torch's AdamW. Return the losses."""
    settings = runtime.settings
    with suppress_peft_warnings():
        peft_model: Any = get_peft_model(copy.deepcopy(runtime.model), runtime.make_config(arm)).eval()
    named = set_first_values(runtime, arm, peft_model)
    optimizer = torch.optim.AdamW(named.values(), lr=arm.learning_rate, weight_decay=0.0)
    first = [group["lr"] for group in optimizer.param_groups]
    factor = make_schedule(settings, arm.steps)
    losses: list[float] = []
    for step, indices in enumerate(runtime.plan_batches(arm.seed)):
        batch = runtime.evaluator.make_batch("train", indices)
        for group, rate in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = rate * factor(step)
        loss = peft_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def compute_example_losses(model: Any, runtime: Runtime) -> list[float]:
    """Return the summed label losses of each validation example, one at a time, from transformers' own loss."""
    losses = []
    for index in range(len(runtime.data.splits["validation"])):
        batch = runtime.evaluator.make_batch("validation", [index])
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        losses.append(float(loss.detach()) * int((batch.labels[:, 1:] != -100).sum()))
    return losses
