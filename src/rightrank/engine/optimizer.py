"""The optimizer of an arm, its state and its learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import get_scheduler

from rightrank.records import Arm
from rightrank.settings import SelectSettings

EMBEDDING_LR = 1e-6  # of LoRA+ on embeddings: PEFT's loraplus_lr_embedding


def make_optimizer(
    named: Mapping[str, torch.nn.Parameter], learning_rate: float, settings: SelectSettings
) -> torch.optim.AdamW:
    """AdamW over the adapter's parameters, with torch's fused kernel where the device has one.

    Each group's `factor` multiplies the learning rate of the schedule.
    """
    parameters = list(named.values())
    optimizer = torch.optim.AdamW(
        _groups(named, learning_rate, settings.loraplus_lr_ratio),
        lr=learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=is_fused(parameters[0]),
    )
    for parameter in parameters:
        optimizer.state[parameter] = fresh_state(parameter, is_fused(parameter))
    return optimizer


def _groups(named: Mapping[str, torch.nn.Parameter], learning_rate: float, ratio: float | None) -> list[dict[str, Any]]:
    """One group; with LoRA+ (Hayou et al. 2024) one each for A, B and embeddings, as PEFT's `create_loraplus_optimizer`."""
    if ratio is None:
        return [{"params": list(named.values()), "factor": 1.0}]
    factors = (1.0, ratio, EMBEDDING_LR / learning_rate)
    groups: tuple[list[torch.nn.Parameter], ...] = ([], [], [])
    for name, parameter in named.items():
        if "lora_embedding_" in name:
            groups[2].append(parameter)
        else:
            groups["lora_B" in name or parameter.ndim == 1].append(parameter)
    return [{"params": group, "factor": factor} for group, factor in zip(groups, factors, strict=True) if group]


def is_fused(parameter: torch.Tensor) -> bool:
    return parameter.device.type in ("cpu", "cuda")


def fresh_state(parameter: torch.nn.Parameter, fused: bool) -> dict[str, torch.Tensor]:
    """AdamW's state before the first step, allocated when the arm is added, so that the first step needs no new memory."""
    device = parameter.device if fused else torch.device("cpu")
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def learning_rate_schedule(settings: SelectSettings, steps: int) -> Callable[[int], float]:
    """transformers' schedule as a pure function: the factor on the learning rate by step, counted from 0."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = math.ceil(settings.warmup_ratio * steps)
    name = "constant_with_warmup" if settings.lr_scheduler_type == "constant" else settings.lr_scheduler_type
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor


def arm_schedule(settings: SelectSettings, arm: Arm) -> Callable[[int], float]:
    """The factor on the arm's learning rate by step, counted from 0: the settings' schedule over all steps.

    An annealed copy follows it up to `anneal_from`, then decays linearly to 0 at `stop_at`.
    """
    schedule = learning_rate_schedule(settings, arm.steps)
    start, end = arm.anneal_from, arm.stop_at
    if start is None or end is None:
        return schedule
    return lambda step: schedule(step) if step < start else schedule(start) * (end - step) / (end - start)


def optimizer_state(
    tensors: Mapping[str, torch.Tensor], index: int, parameter: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The state of parameter number `index` from a checkpoint's tensors, on the parameter's device."""
    prefix = f"optimizer.{index}."
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return {
        key: value.to(parameter.device) if value.dim() > 0 or is_fused(parameter) else value
        for key, value in state.items()
    }
