"""The speed of training on this device, measured on a few real steps, and the number of adapters that share a pass.

On a CPU a larger batch hardly lowers the time per example, so arms are trained one after the other unless the settings give a number.
On an accelerator as many share a pass as fit into memory; `loop.py` continues with fewer where the plan was wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeVar

import torch

from rightrank.data.splits import HELD_OUT
from rightrank.evaluation.batches import Batch, batch_by_length
from rightrank.evaluation.device import catch_memory_errors, free_memory
from rightrank.schema.errors import MultiLoraError
from rightrank.schema.settings import EVAL_SUBSET_SIZE, MAX_ADAPTERS_PER_PASS
from rightrank.schema.trials import Arm
from rightrank.training.multi_lora import ArmBatch, MultiLora
from rightrank.training.optimizer import ArmOptimizer, make_schedule, take_step
from rightrank.training.runtime import Runtime

CHECK_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # relative, of example losses
WARM_UP_STEPS, TIMED_STEPS = 1, 3
SCRATCH = "scratch"  # name of the temporary adapter
RUN_EVALUATIONS = 4  # one of the base, and three of the test split, which is about as large
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Pace:
    """The seconds of a training of one rank on this device, measured on a few real steps. Other ranks take about as long."""

    rank: int
    batches: list[list[int]]  # training examples of each timed step
    training_seconds: float  # all steps of a full training
    evaluation_seconds: float  # one pass over the validation examples
    subset_fraction: float  # fraction of the validation examples that an evaluation during training scores
    cache_seconds: float  # everything that is computed once per example: frozen blocks, or reference log-probabilities

    def predict_seconds(self, trainings: float, arms: int, num_evaluations: int) -> float:
        """Predict the seconds of a selection. Loading, checkpoints, samples and the report are not counted.

        Args:
            trainings: the number of full trainings, one after the other.
            arms: the number of arms, including those that stop early or are truncated.
            num_evaluations: the number of evaluations during a training.
        """
        num_end_evaluations = max(0.0, arms - 1 - trainings)  # evaluations of arms that stop early or are truncations
        during = trainings * (1 + self.subset_fraction * (num_evaluations - 1))
        evaluation_seconds = (during + num_end_evaluations + RUN_EVALUATIONS) * self.evaluation_seconds
        return trainings * self.training_seconds + evaluation_seconds + self.cache_seconds


def measure_pace(runtime: Runtime, arm: Arm) -> Pace | None:
    """Train a temporary adapter of `arm` for a few steps and evaluate it on a batch; return None if memory runs out."""
    with catch_memory_errors():
        return _time_training(runtime, arm)
    free_memory(runtime.loaded.device)
    return None


def _time_training(runtime: Runtime, arm: Arm) -> Pace:
    full_plan = runtime.plan_batches(arm.seed)
    plan = full_plan[: WARM_UP_STEPS + TIMED_STEPS]
    validation_batches = batch_by_length(runtime.data.splits["validation"], runtime.settings.eval_batch_size)
    eval_indices = validation_batches[len(validation_batches) // 2]
    fill_seconds, filled = _time_task(
        runtime, lambda: list(runtime.evaluator.compute_base_results("train", chain.from_iterable(plan)))
    )
    num_filled = _count_tokens(runtime, filled)
    list(runtime.evaluator.compute_base_results("validation", eval_indices))
    with MultiLora(runtime.model, runtime.settings) as multi_lora, runtime.use_gradient_checkpointing():
        parameters = multi_lora.add(SCRATCH, arm, runtime.make_config(arm))
        schedule = make_schedule(runtime.settings, arm.steps)
        optimizer = ArmOptimizer(runtime, parameters, arm.learning_rate, plan, schedule)

        def run_pass(batches: Sequence[Batch], _: int) -> list[torch.Tensor]:
            arm_batches = [ArmBatch(SCRATCH, batches[0], 1 / optimizer.labels, 0)]
            return runtime.accumulate_gradients(multi_lora, arm_batches)

        seconds = [_time_task(runtime, partial(take_step, [optimizer], run_pass))[0] for _ in plan]
        evaluate = partial(runtime.evaluate_adapters, "validation", multi_lora, [SCRATCH], eval_indices)
        eval_seconds = _time_task(runtime, evaluate)[0]
    timed_steps = slice(min(WARM_UP_STEPS, len(plan) - 1), None)
    token_ratio = _count_tokens(runtime, full_plan) / _count_tokens(runtime, plan[timed_steps])
    num_held_out = len(runtime.data.splits["validation"])
    return Pace(
        arm.rank,
        plan[timed_steps],
        training_seconds=sum(seconds[timed_steps]) * token_ratio,
        evaluation_seconds=eval_seconds * num_held_out / len(eval_indices),
        subset_fraction=min(1.0, EVAL_SUBSET_SIZE / num_held_out),
        cache_seconds=fill_seconds * _count_cached_tokens(runtime, full_plan) / num_filled if num_filled else 0.0,
    )


def _count_tokens(runtime: Runtime, plan: Sequence[list[int]]) -> int:
    return sum(int(runtime.data.splits["train"].lengths[indices].sum()) for indices in plan)


def _count_cached_tokens(runtime: Runtime, plan: Sequence[list[int]]) -> int:
    """Count the tokens for which a selection computes results of the base alone."""
    held_out = (runtime.data.splits[split] for split in HELD_OUT)
    return _count_tokens(runtime, [sorted({*chain.from_iterable(plan)})]) + sum(
        int(examples.lengths.sum()) for examples in held_out
    )


def choose_adapters_per_pass(
    runtime: Runtime, arms: Sequence[Arm], notice: Callable[[str], None], limit: int | None = None
) -> int:
    """Choose the number of arms to train in one pass.

    Args:
        notice: receives a message if the number is lower than the settings request.
        limit: the largest number that fits in memory according to the plan; None if the plan does not say.
    """
    requested = runtime.settings.adapters_per_pass
    on_cpu = runtime.loaded.device.type == "cpu"
    if requested == 1 or len(arms) < 2 or (requested is None and on_cpu):
        return 1
    obstacle = find_multi_lora_obstacle(runtime, arms)
    if obstacle is not None:
        notice(f"arms are trained one after the other: {obstacle}")
        return 1
    size = requested or MAX_ADAPTERS_PER_PASS
    if limit is None or limit >= size:
        return size
    if requested is not None:
        notice(f"adapters_per_pass {requested} may not fit in memory according to the plan: continuing with {limit}")
    return limit


def find_multi_lora_obstacle(runtime: Runtime, arms: Sequence[Arm]) -> str | None:
    """Return the reason why two arms cannot share a pass over this model, tested on a batch of real data; None if they can."""
    reason = runtime.targets.unshared_reason
    if reason is not None:
        return reason
    try:
        with catch_memory_errors() as reasons:
            shared, alone = _compute_probe_losses(runtime, arms[:2])
    except MultiLoraError as error:
        return str(error)
    if reasons:
        return f"two adapters don't fit on {runtime.loaded.device}"
    tolerance = CHECK_TOLERANCE[next(runtime.model.parameters()).dtype]
    if not torch.allclose(shared, alone, rtol=tolerance, atol=tolerance):
        return "this model's losses differ when two arms share a pass"
    return None


def _compute_probe_losses(runtime: Runtime, arms: Sequence[Arm]) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute example losses of two arms with random adapters on two batches: in one shared pass, and in one pass each."""
    names = [f"scratch_{number}" for number in range(len(arms))]
    generator = torch.Generator().manual_seed(0)
    with MultiLora(runtime.model, runtime.settings) as multi_lora:
        for name, arm in zip(names, arms, strict=True):
            for parameter in multi_lora.add(name, arm, runtime.make_config(arm)).values():
                drawn = torch.randn(parameter.shape, generator=generator) * 0.02
                parameter.data.copy_(parameter.data + drawn.to(parameter))
        plan, size = runtime.plan_batches(arms[0].seed)[0], runtime.settings.batch_size
        batches = [
            runtime.evaluator.make_batch("train", plan[:size]),
            runtime.evaluator.make_batch("train", list(reversed(plan))[: max(1, size // 2)]),
        ]
        arm_batches = [ArmBatch(name, batch, 1.0, None) for name, batch in zip(names, batches, strict=True)]
        shared = torch.cat(runtime.accumulate_gradients(multi_lora, arm_batches))
        alone = torch.cat([runtime.accumulate_gradients(multi_lora, [arm_batch])[0] for arm_batch in arm_batches])
    return shared, alone


def _time_task(runtime: Runtime, task: Callable[[], Result]) -> tuple[float, Result]:
    """Return `(seconds, result)` of a task, including the work that it queued on the device."""
    start_time = time.perf_counter()
    result = task()
    if runtime.loaded.device.type == "cuda":
        torch.cuda.synchronize(runtime.loaded.device)
    return time.perf_counter() - start_time, result
