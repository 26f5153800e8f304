"""The optimizer step of adapters that share a pass, the optimizer and schedule of each arm, and the files of their checkpoints."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from rightrank.data.files import UnreadableError, parse_json, replace_file
from rightrank.evaluation.batches import Batch
from rightrank.schema.settings import SelectSettings
from rightrank.training.progress import TrainingProgress
from rightrank.training.runtime import Runtime

BEST_PREFIX = "best."  # prefix of the best parameters among a checkpoint's tensors
Schedule: TypeAlias = Callable[[int], float]  # step (from 0) → factor of the learning rate
# The same patterns as in transformers' Trainer.
NO_DECAY_PATTERNS = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
# `warmup`: since the warm-up, which may be handed over; `quarter`: over the last quarter of the steps, which ranks learning rates
MeanName: TypeAlias = Literal["warmup", "quarter"]
RunPass: TypeAlias = Callable[[Sequence[Batch], int], Sequence[torch.Tensor]]


def take_step(optimizers: Sequence[ArmOptimizer], run_pass: RunPass) -> None:
    """Take one optimizer step of every adapter, with one pass over the base per micro-batch.

    Args:
        run_pass: receives the adapters' micro-batches and their number within the step. It adds the gradients to the
            adapters' tensors and returns the example losses [b] of each adapter, on the CPU.
    """
    for number, batches in enumerate(zip(*[optimizer.begin_step() for optimizer in optimizers], strict=True)):
        for optimizer, losses in zip(optimizers, run_pass(batches, number), strict=True):
            optimizer.loss_sum += float(losses.sum())
    for optimizer in optimizers:
        optimizer.apply_gradients()


class RunningMean:
    """The mean of parameters over the steps after `start`, kept as a sum."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], start: int) -> None:
        self.start = start
        self.sums = {name: torch.zeros_like(value, requires_grad=False) for name, value in parameters.items()}

    def add(self, parameters: Mapping[str, torch.Tensor], step: int) -> None:
        if step > self.start:
            for name, total in self.sums.items():
                total.add_(parameters[name].detach())

    def compute(self, step: int) -> dict[str, torch.Tensor]:
        return {name: total / (step - self.start) for name, total in self.sums.items()}


@dataclass(eq=False)
class ArmOptimizer:
    """The optimizer of one adapter, with everything that a checkpoint of its training contains."""

    _runtime: Runtime
    named_parameters: Mapping[str, torch.nn.Parameter]  # trainable tensors by PEFT's names
    _learning_rate: float  # multiplied by the schedule's factor
    _plan: Sequence[Sequence[int]]  # example indices of each step
    _schedule: Schedule
    # The means of the parameters to keep, with the step after which each begins.
    mean_starts: Mapping[MeanName, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._parameters = list(self.named_parameters.values())
        self._optimizer = _make_optimizer(self._parameters, self._learning_rate, self._runtime)
        self.progress = TrainingProgress()
        self.best: Mapping[str, torch.Tensor] = {}  # the parameters at the best evaluation so far
        self.means = {name: RunningMean(self.named_parameters, start) for name, start in self.mean_starts.items()}
        # These belong to the current step.
        self.loss_sum = 0.0
        self.labels = 0  # sum of the examples' loss weights, which divides the losses
        self._tokens = 0  # without padding

    def begin_step(self) -> list[Batch]:
        """Set the learning rate of the next step and return its micro-batches."""
        size, indices = self._runtime.settings.batch_size, self._plan[self.progress.step]
        micro = [indices[start : start + size] for start in range(0, len(indices), size)]
        batches = [self._runtime.evaluator.make_batch("train", micro_batch) for micro_batch in micro]
        examples = [self._runtime.data.splits["train"][index] for index in indices]
        self.loss_sum = 0.0
        self.labels = sum(map(self._runtime.data.get_loss_weight, examples))
        self._tokens = sum(example.length for example in examples)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * self._schedule(self.progress.step)
        self._optimizer.zero_grad(set_to_none=True)  # a step that ran out of memory may have left gradients
        return batches

    def apply_gradients(self) -> None:
        if self._runtime.settings.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._runtime.settings.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.progress.train_losses.append(self.loss_sum / self.labels)
        self.progress.step += 1
        for mean in self.means.values():
            mean.add(self.named_parameters, self.progress.step)
        self.progress.train_tokens += self._tokens

    def _list_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that a step changes, under their names in a checkpoint."""
        tensors = {f"parameter.{name}": value.detach() for name, value in self.named_parameters.items()}
        for index, parameter in enumerate(self._parameters):
            state = self._optimizer.state[parameter]
            tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        for kind, mean in self.means.items():
            tensors |= {f"sum.{kind}.{name}": total for name, total in mean.sums.items()}
        return tensors

    def collect_tensors(self) -> dict[str, torch.Tensor]:
        return self._list_tensors() | {f"{BEST_PREFIX}{name}": value for name, value in self.best.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        for name, tensor in self._list_tensors().items():
            tensor.copy_(tensors[name])
        self.best = {
            name.removeprefix(BEST_PREFIX): value for name, value in tensors.items() if name.startswith(BEST_PREFIX)
        }
        self.progress = TrainingProgress.model_validate(state)

    def keep_best(self, mean: MeanName | None) -> None:
        """Keep a mean of the parameters as the best so far, or the parameters themselves if the mean is None."""
        parameters = self._copy_parameters() if mean is None else self.means[mean].compute(self.progress.step)
        self.best = {name: value.cpu() for name, value in parameters.items()}

    def _copy_parameters(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.named_parameters.items()}

    @contextmanager
    def use_mean(self, name: MeanName) -> Iterator[None]:
        """Put a mean of the parameters in their place within the block.

        The mean is taken of A and of B, as averages of weights are (Hägele et al. 2024, arXiv 2405.18392).
        """
        current = self._copy_parameters()
        self.set_parameters(self.means[name].compute(self.progress.step))
        try:
            yield
        finally:
            self.set_parameters(current)

    @torch.no_grad()
    def set_parameters(self, parameters: Mapping[str, torch.Tensor]) -> None:
        for name, value in self.named_parameters.items():
            value.copy_(parameters[name])


def count_warmup_steps(settings: SelectSettings, steps: int) -> int:
    return math.ceil(settings.warmup_ratio * steps)


def make_schedule(settings: SelectSettings, steps: int) -> Schedule:
    """Return transformers' learning-rate schedule over `steps` as a pure function."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = count_warmup_steps(settings, steps)
    name = "constant_with_warmup" if settings.lr_scheduler_type == "constant" else settings.lr_scheduler_type
    factor: Schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps).lr_lambdas[0]
    return factor


def _make_optimizer(
    parameters: Sequence[torch.nn.Parameter], learning_rate: float, runtime: Runtime
) -> torch.optim.Optimizer:
    """Make torch's AdamW over the adapter's parameters, with its fused kernel if the device has one.

    As in transformers' Trainer, biases and the weights of norms do not decay. States are allocated here, when the arm is added, so
    that the first step needs no additional memory.
    """
    fused, settings = parameters[0].device.type in ("cpu", "cuda"), runtime.settings
    decayed = set(get_parameter_names(runtime.model, [torch.nn.LayerNorm], NO_DECAY_PATTERNS))  # type: ignore[no-untyped-call]
    decaying = {id(value) for name, value in runtime.model.named_parameters() if name in decayed}
    groups = [
        {
            "params": [parameter for parameter in parameters if (id(parameter) in decaying) == decays],
            "weight_decay": decay,
        }
        for decays, decay in ((True, settings.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=(0.9, 0.999),
        fused=fused,
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def save_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Write one safetensors file with a checksum, replaced atomically."""
    cpu_tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps(dict(state))
    with replace_file(path) as temporary:
        save_file(cpu_tensors, temporary, metadata={"state": text, "crc": _compute_checksum(text, cpu_tensors)})


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Load `(tensors, state)` of a checkpoint; None if it does not exist or is damaged (the trial then starts from step 0)."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata["crc"] != _compute_checksum(metadata["state"], tensors):
                return None
            return tensors, parse_json(metadata["state"])
    except (SafetensorError, KeyError, TypeError, UnreadableError):
        return None


def _compute_checksum(state: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Compute the CRC-32 in hex over the state and every tensor's name, shape and bytes."""
    checksum = zlib.crc32(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"
