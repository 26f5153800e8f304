"""The pace of a run on its device: a few steps of an adapter that is thrown away, timed before the first training.

The steps change no result: the adapter is drawn and removed like any other, every draw has its own seed, and what the base
alone gives for the examples is computed in the same groups as later, and kept.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from rightrank.engine.batches import length_sorted_batches
from rightrank.engine.memory import free_memory, is_recoverable_oom
from rightrank.engine.multi_lora import ArmBatch, MultiLora
from rightrank.engine.optimizer import arm_schedule
from rightrank.engine.runtime import Runtime
from rightrank.engine.steps import OptimizerSteps
from rightrank.records import Arm

WARM_UP_STEPS = 1
TIMED_STEPS = 3
SCRATCH = "pace"  # the adapter's name


@dataclass(frozen=True, slots=True)
class Pace:
    """What was timed, and the seconds that it took."""

    rank: int
    batches: list[list[int]]  # training examples of each timed step
    train_seconds: float
    evaluated: list[int]  # validation examples
    eval_seconds: float
    filled: int  # training examples whose frozen blocks, or whose reference, were computed
    fill_seconds: float


def measure_pace(runtime: Runtime, arm: Arm) -> Pace | None:
    """Train a scratch adapter of `arm` for a few steps and evaluate it on a batch; None where memory runs out."""
    try:
        return _measure(runtime, arm)
    except (RuntimeError, MemoryError) as error:
        if not is_recoverable_oom(error):
            raise
    free_memory(runtime.loaded.device)
    return None


def _measure(runtime: Runtime, arm: Arm) -> Pace:
    plan = runtime.batch_plan(arm.seed)[: WARM_UP_STEPS + TIMED_STEPS]
    batches = length_sorted_batches(runtime.examples("selection"), runtime.settings.eval_batch_size)
    evaluated = list(batches[len(batches) // 2])
    begun = time.perf_counter()
    filled = runtime.fill("train", [index for indices in plan for index in indices])
    _wait(runtime)
    fill_seconds = time.perf_counter() - begun
    runtime.fill("selection", evaluated)
    with MultiLora(runtime.model, runtime.settings) as multi_lora, runtime.recomputing():
        named = multi_lora.add(SCRATCH, arm, runtime.arm_targets.config(arm))
        schedule = arm_schedule(runtime.settings, arm)
        steps = OptimizerSteps(runtime, named, arm.learning_rate, plan, schedule)
        seconds = [_step_seconds(runtime, multi_lora, steps, number) for number in range(len(plan))]
        begun = time.perf_counter()
        runtime.evaluate_adapters("selection", multi_lora, [SCRATCH], evaluated)
        _wait(runtime)
        eval_seconds = time.perf_counter() - begun
    timed = slice(min(WARM_UP_STEPS, len(plan) - 1), None)
    return Pace(arm.rank, plan[timed], sum(seconds[timed]), evaluated, eval_seconds, filled, fill_seconds)


def _step_seconds(runtime: Runtime, multi_lora: MultiLora, steps: OptimizerSteps, number: int) -> float:
    begun = time.perf_counter()
    loss_sum = 0.0
    for batch in steps.begin(number):
        losses = runtime.accumulate_gradients(multi_lora, [ArmBatch(SCRATCH, batch, 1 / steps.labels, 0)])
        loss_sum += float(losses[0].sum())
    steps.update(loss_sum)
    _wait(runtime)
    return time.perf_counter() - begun


def _wait(runtime: Runtime) -> None:
    """Until the device has done what was sent to it."""
    if runtime.loaded.device.type == "cuda":
        torch.cuda.synchronize(runtime.loaded.device)
