"""The optimizer steps of one adapter: batches, learning rate, gradient clipping and AdamW, whoever runs the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from rightrank.engine.batches import Batch
from rightrank.engine.distributed import all_reduce
from rightrank.engine.optimizer import make_optimizer
from rightrank.engine.runtime import Runtime


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
