"""The optimizer of an arm, its state and the schedule of its rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from transformers import get_scheduler

from rightrank.settings import SelectSettings


def make_optimizer(parameters: list[torch.nn.Parameter], rate: float, settings: SelectSettings) -> torch.optim.AdamW:
    """AdamW over the adapter, fused where the device has it."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=is_fused(parameters[0]),
    )
    for parameter in parameters:
        optimizer.state[parameter] = fresh_state(parameter, is_fused(parameter))
    return optimizer


def is_fused(parameter: torch.Tensor) -> bool:
    return parameter.device.type in ("cpu", "cuda")


def fresh_state(parameter: torch.nn.Parameter, fused: bool) -> dict[str, torch.Tensor]:
    """AdamW's state before its first step, made when the arm joins: no step then asks for memory half of the way."""
    device = parameter.device if fused else torch.device("cpu")
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def learning_rate_schedule(settings: SelectSettings, steps: int) -> Callable[[int], float]:
    """transformers' schedule as a pure function of the step: the factor on the learning rate."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = math.ceil(settings.warmup_ratio * steps)
    name = "constant_with_warmup" if settings.lr_scheduler_type == "constant" else settings.lr_scheduler_type
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor


def optimizer_state(
    tensors: Mapping[str, torch.Tensor], index: int, parameter: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The state of one parameter out of a checkpoint's tensors, where the parameter is."""
    prefix = f"optimizer.{index}."
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return {
        key: value.to(parameter.device) if value.dim() > 0 or is_fused(parameter) else value
        for key, value in state.items()
    }
