"""The optimizer of an arm, its state and its learning rate schedule.

`adamw_8bit` keeps the states of matrices of 4,096 elements and more in 8 bits, in blocks of 256 (Dettmers et al. 2022,
bitsandbytes): a quarter of the memory. Every matrix is updated by itself, so an arm's numbers are the same in a pass with others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import get_scheduler

from rightrank.data.files import require_optimizer_extra
from rightrank.schema.errors import SettingsError
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm
from rightrank.train.batches import Batch
from rightrank.train.distributed import all_reduce
from rightrank.train.runtime import Runtime

DECODING_TABLES = ("qmap1", "qmap2")  # of bitsandbytes: the same for every parameter
EMBEDDING_LR = 1e-6  # of LoRA+ on embeddings: PEFT's loraplus_lr_embedding


def make_optimizer(
    named: Mapping[str, torch.nn.Parameter], learning_rate: float, settings: SelectSettings
) -> torch.optim.Optimizer:
    """AdamW over the adapter's parameters: torch's, with its fused kernel where the device has one, or the one in 8 bits.

    Each group's `factor` multiplies the learning rate of the schedule.
    """
    parameters = list(named.values())
    groups = _groups(named, learning_rate, settings.loraplus_lr_ratio)
    arguments: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
    }
    if settings.optim == "adamw_8bit":
        return _adamw_8bit(groups, arguments)
    optimizer = torch.optim.AdamW(groups, fused=is_fused(parameters[0]), **arguments)
    for parameter in parameters:
        optimizer.state[parameter] = fresh_state(parameter, is_fused(parameter))
    return optimizer


def _adamw_8bit(groups: list[dict[str, Any]], arguments: Mapping[str, Any]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    optimizer: Any = AdamW8bit(groups, **arguments)
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, number, index)  # before the first step, as `fresh_state`
    found: torch.optim.Optimizer = optimizer
    return found


def require_optimizer(settings: SelectSettings, device: torch.device) -> None:
    """Refuse an optimizer that this device or this installation does not have.

    Raises:
        MissingExtraError: 8-bit states without bitsandbytes.
        SettingsError: bitsandbytes has no 8-bit states on this device.
    """
    if settings.optim != "adamw_8bit":
        return
    require_optimizer_extra(settings)
    if device.type not in ("cuda", "cpu") or not _steps_in_8bit(device):
        raise SettingsError(
            f"optim adamw_8bit: bitsandbytes has no 8-bit AdamW on {device}; give optim adamw_torch or another device"
        )


def _steps_in_8bit(device: torch.device) -> bool:
    """Whether a step with 8-bit states runs on the device: releases of bitsandbytes before 0.49 have it on CUDA alone."""
    parameter = torch.nn.Parameter(torch.zeros(64, 64, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        _adamw_8bit([{"params": [parameter]}], {"lr": 1e-3}).step()
    except (NotImplementedError, RuntimeError, AttributeError):
        return False
    return True


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


def state_tensors(optimizer: torch.optim.Optimizer, index: int, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state of parameter number `index` as the tensors of a checkpoint. Tables that decode 8 bits are constants."""
    return {
        f"optimizer.{index}.{key}": torch.as_tensor(value)
        for key, value in optimizer.state[parameter].items()
        if key not in DECODING_TABLES
    }


def restore_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], index: int, parameter: torch.Tensor
) -> None:
    """Put the state of parameter number `index` from a checkpoint's tensors on the parameter's device."""
    prefix, fresh = f"optimizer.{index}.", optimizer.state[parameter]
    saved = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    tables = {key: value for key, value in fresh.items() if key in DECODING_TABLES}
    optimizer.state[parameter] = tables | {key: _as_kept(value, fresh[key], parameter) for key, value in saved.items()}


def _as_kept(value: torch.Tensor, fresh: object, parameter: torch.Tensor) -> torch.Tensor | int:
    """A saved value as the optimizer keeps it: bitsandbytes counts steps in an integer, torch in a tensor."""
    if isinstance(fresh, int):
        return int(value)
    return value.to(parameter.device) if value.dim() > 0 or is_fused(parameter) else value


class OptimizerSteps:
    """Call `begin`, add gradients of every micro-batch to the parameters, call `update`.

    Args:
        named: what is trained, by PEFT's names.
        learning_rate: what the schedule's factor multiplies.
        plan: example indices of each step.
        schedule: the factor on the learning rate by step, counted from 0.
    """

    def __init__(
        self,
        runtime: Runtime,
        named: Mapping[str, torch.nn.Parameter],
        learning_rate: float,
        plan: Sequence[Sequence[int]],
        schedule: Callable[[int], float],
    ) -> None:
        self._runtime = runtime
        self._settings = runtime.settings
        self._parameters = list(named.values())
        self._learning_rate = learning_rate
        self._plan = plan
        self._schedule = schedule
        self.optimizer = make_optimizer(named, learning_rate, runtime.settings)
        self.labels = 0  # what the losses of the step under way are divided by (`loss_weight`)
        self.tokens = 0  # without padding

    def begin(self, step: int) -> list[Batch]:
        """The micro-batches of `step`, counted from 0; its learning rate goes into the optimizer."""
        size, indices = self._settings.batch_size, self._plan[step]
        micro = [indices[start : start + size] for start in range(0, len(indices), size)]
        batches = [self._runtime.share("train", part) for part in micro]
        examples = [self._runtime.examples("train")[index] for index in indices]
        self.labels = sum(map(self._runtime.data.loss_weight, examples))
        self.tokens = sum(example.length for example in examples)
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * self._learning_rate * self._schedule(step)
        self.optimizer.zero_grad(set_to_none=True)  # of a step that ran out of memory
        return batches

    def update(self, loss_sum: float) -> float:
        """Clip and step, gradients and losses first summed over the processes; the step's mean loss, nats a label."""
        loss = torch.tensor([loss_sum], dtype=torch.float64)
        all_reduce([loss])
        all_reduce([parameter.grad for parameter in self._parameters if parameter.grad is not None])
        if self._settings.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss) / self.labels
