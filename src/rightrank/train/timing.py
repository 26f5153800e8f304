"""The pace of a training on this device, from a few real steps of a scratch adapter: what a selection will take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from rightrank.data.token_store import lengths_of, longest_sequences
from rightrank.schema.trials import Arm
from rightrank.train.batches import Batch, length_sorted_batches
from rightrank.train.device import free_memory, memory_permitting
from rightrank.train.multi_lora import ArmBatch, MultiLora
from rightrank.train.optimizer import ArmOptimizer, arm_schedule, take_step
from rightrank.train.pace import TIMED_STEPS, WARM_UP_STEPS, timed
from rightrank.train.runtime import Runtime

SCRATCH = "scratch"  # an adapter's name
RUN_EVALUATIONS = 4  # of the base, and three of the test split, which is about as large


@dataclass(frozen=True, slots=True)
class Pace:
    """The seconds of a training of one rank on this device, from a few real steps."""

    rank: int
    batches: list[list[int]]  # training examples of each timed step
    evaluated: list[int]  # validation examples of the timed batch
    training_seconds: float  # of all steps of a whole training
    evaluation_seconds: float  # of a pass over the validation examples
    filling_seconds: float  # of all that is computed once for an example: frozen blocks, or the reference
    matrices: int  # elements of the adapted matrices
    by_rank: int  # parameters of the adapter, by rank

    def seconds(self, rank: float, trainings: float, arms: int, eval_points: int) -> float:
        """Of a selection of so many whole trainings, among `arms` arms, one after the other, at the pace of `rank`.

        A step multiplies the adapted matrices forward and backward, and the adapter a third time for its gradients. Loading,
        checkpoints, samples and the report are not counted.
        """
        work, own = (2 * self.matrices + 3 * self.by_rank * one for one in (rank, self.rank))
        ends = max(0.0, arms - 1 - trainings)  # evaluations of arms that are stopped early, or truncated from another
        evaluations = work / own * (trainings * eval_points + ends) + RUN_EVALUATIONS
        steps = work / own * trainings * self.training_seconds
        return steps + evaluations * self.evaluation_seconds + self.filling_seconds


def measure_pace(runtime: Runtime, arm: Arm) -> Pace | None:
    """Train a scratch adapter of `arm` for a few steps and evaluate it on a batch; None where memory runs out."""
    with memory_permitting():
        return _measure(runtime, arm)
    free_memory(runtime.loaded.device)
    return None


def _measure(runtime: Runtime, arm: Arm) -> Pace:
    whole = runtime.batch_plan(arm.seed)
    plan = whole[: WARM_UP_STEPS + TIMED_STEPS]
    batches = length_sorted_batches(runtime.examples("selection"), runtime.settings.eval_batch_size)
    evaluated = list(batches[len(batches) // 2])
    trained = [index for indices in plan for index in indices]
    fill_seconds, filled = timed(runtime, lambda: runtime.fill("train", trained))
    runtime.fill("selection", evaluated)
    with MultiLora(runtime.model, runtime.settings) as multi_lora, runtime.recomputing():
        named = multi_lora.add(SCRATCH, arm, runtime.config(arm))
        schedule = arm_schedule(runtime.settings, arm)
        optimizer = ArmOptimizer(runtime, named, arm.learning_rate, plan, schedule)

        def run_pass(batches: Sequence[Batch], _: int) -> list[torch.Tensor]:
            arm_batches = [ArmBatch(SCRATCH, batches[0], 1 / optimizer.labels, 0)]
            return runtime.accumulate_gradients(multi_lora, arm_batches)

        seconds = [timed(runtime, partial(take_step, [optimizer], run_pass))[0] for _ in plan]
        evaluate = partial(runtime.evaluate_adapters, "selection", multi_lora, [SCRATCH], evaluated)
        eval_seconds = timed(runtime, evaluate)[0]
    kept = slice(min(WARM_UP_STEPS, len(plan) - 1), None)
    held_out = len(runtime.examples("selection"))
    examples = len({index for indices in whole for index in indices}) + held_out + len(runtime.examples("test"))
    return Pace(
        arm.rank,
        plan[kept],
        evaluated,
        training_seconds=sum(seconds[kept]) * _positions(runtime, whole) / _positions(runtime, plan[kept]),
        evaluation_seconds=eval_seconds * held_out / len(evaluated),
        filling_seconds=fill_seconds * examples / filled if filled else 0.0,
        matrices=sum(one.in_features * one.out_features for one in runtime.targets.modules),
        by_rank=sum(one.in_features + one.out_features for one in runtime.targets.modules),
    )


def _positions(runtime: Runtime, batches: Sequence[list[int]]) -> int:
    """The positions that the model computes in these steps, padding included."""
    train, size = runtime.examples("train"), runtime.settings.batch_size
    if runtime.fast_paths.sequence_packing:
        lengths = lengths_of(train)
        return sum(int(lengths[batch].sum()) for batch in batches)
    longest = longest_sequences(train)
    micro = [batch[start : start + size] for batch in batches for start in range(0, len(batch), size)]
    return sum(len(rows) * int(longest[rows].max()) for rows in micro)
