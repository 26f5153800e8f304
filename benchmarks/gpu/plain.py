"""The loop over PEFT that anyone would write, from the first values of an arm; the suite compares the engine with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from rightrank.schema.trials import Arm
from rightrank.train.multi_lora import ADAPTER, MultiLora, lora_modules
from rightrank.train.optimizer import learning_rate_schedule
from rightrank.train.runtime import Runtime
from rightrank.train.targets import without_peft_noise


@contextmanager
def fresh_adapter(runtime: Runtime, arm: Arm) -> Iterator[Any]:
    """The PeftModel of a freshly initialised arm in training mode, with PEFT's own forward pass."""
    with MultiLora(runtime.model, runtime.settings) as multi_lora:
        multi_lora.add(ADAPTER, arm, runtime.config(arm))
        for module in multi_lora.peft_model.modules():
            if isinstance(module, LoraLayer | ModulesToSaveWrapper):
                del vars(module)["forward"]  # that of several adapters
        for module in lora_modules(multi_lora.peft_model).values():
            module.training = True  # which DoRA asks for before it drops anything out
            module.lora_dropout.train()
        with runtime.recomputing():
            yield multi_lora.peft_model


def trainable_parameters(peft_model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}


def with_first_values(runtime: Runtime, arm: Arm, peft_model: Any) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters of another PEFT model by name, set to the values that a training of `arm` starts from."""
    with fresh_adapter(runtime, arm) as ours:
        initial = {name: value.detach().clone() for name, value in trainable_parameters(ours).items()}
    named = {name: value for name, value in peft_model.named_parameters() if value.requires_grad}
    assert named.keys() == initial.keys()
    with torch.no_grad():
        for name, value in named.items():
            value.copy_(initial[name])
    return named


def plain_losses(runtime: Runtime, arm: Arm) -> list[float]:
    """The loop anyone would write: PEFT's model and forward pass, the model's own loss, torch's AdamW."""
    settings = runtime.settings
    with without_peft_noise():
        peft_model: Any = get_peft_model(copy.deepcopy(runtime.model), runtime.config(arm)).eval()
    named = with_first_values(runtime, arm, peft_model)
    optimizer = torch.optim.AdamW(named.values(), lr=arm.learning_rate, weight_decay=0.0)
    first = [group["lr"] for group in optimizer.param_groups]
    factor = learning_rate_schedule(settings, arm.steps)
    losses: list[float] = []
    for step, indices in enumerate(runtime.batch_plan(arm.seed)):
        batch = runtime.batch("train", indices)
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
def example_losses(model: Any, runtime: Runtime) -> list[float]:
    """The summed label losses of each validation example, one at a time, by transformers' own loss."""
    found = []
    for index in range(len(runtime.data.splits["selection"])):
        batch = runtime.batch("selection", [index])
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        found.append(float(loss.detach()) * int((batch.labels[:, 1:] != -100).sum()))
    return found
