"""The runtime of a run: an evaluator of its base and data, the targets of its adapters, and the order of its training batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from rightrank.bases.base_models import LoadedModel
from rightrank.data.splits import HELD_OUT
from rightrank.evaluation.batches import Batch
from rightrank.evaluation.device import enable_gradient_checkpointing
from rightrank.evaluation.evaluator import Evaluator, build_evaluator
from rightrank.evaluation.loss import BatchLoss, Scale
from rightrank.evaluation.scores import Scores
from rightrank.evaluation.tokens import EncodedData
from rightrank.schema.errors import InterruptedRun
from rightrank.schema.events import EvaluationProgress
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, SplitName
from rightrank.training.multi_lora import ArmBatch, MultiLora
from rightrank.training.targets import Targets, find_targets, make_lora_config

MOMENT_STEPS_FRACTION = 0.1  # additional steps whose examples give the moments of a truncation


def plan_batches(examples: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Draw `steps` batches of `batch_size` example indices in passes over all examples.

    Each pass is a new permutation of the examples. If a pass ends within a batch, the next pass completes the batch.
    """
    generator = np.random.default_rng([seed, 0x8A7C])
    needed = batch_size * steps
    order = np.concatenate([generator.permutation(examples)[:needed] for _ in range(-(-needed // examples))])
    plan: list[list[int]] = order[:needed].reshape(steps, batch_size).tolist()
    return plan


@dataclass(frozen=True, eq=False, repr=False)
class Runtime:
    """What all arms of a run share; `build_runtime` makes one. Its methods work with and without an adapter on the base."""

    evaluator: Evaluator
    settings: SelectSettings
    targets: Targets
    steps: int  # optimizer steps of an arm

    @property
    def loaded(self) -> LoadedModel:
        return self.evaluator.loaded

    @property
    def model(self) -> Any:
        return self.evaluator.loaded.model

    @property
    def data(self) -> EncodedData:
        return self.evaluator.data

    def prepare(self, on_progress: Callable[[EvaluationProgress], None], should_stop: Callable[[], bool]) -> None:
        """Compute the results of the base alone for the training examples that the arms will use, and report progress.

        Raises:
            InterruptedRun: `should_stop` returned True.
        """
        start_time = time.perf_counter()
        expected = self.evaluator.cached_examples["train"]
        num_done = 0
        for group in self.evaluator.compute_base_results("train", expected):
            num_done += len(group)
            seconds = time.perf_counter() - start_time
            label = "frozen layers, once for all trials"
            on_progress(
                EvaluationProgress(label=label, examples=num_done, total_examples=len(expected), seconds=seconds)
            )
            if should_stop():
                raise InterruptedRun("stopped before the first training")

    def plan_batches(self, seed: int, steps: int | None = None) -> list[list[int]]:
        """Return the training batches of every arm of `seed`: one list of example indices per optimizer step.

        A plan with more steps begins with the plan with fewer steps.
        """
        return plan_training_batches(self.data, self.settings, self.steps if steps is None else steps, seed)

    def accumulate_gradients(self, multi_lora: MultiLora, arm_batches: Sequence[ArmBatch]) -> list[torch.Tensor]:
        """Run one forward and backward pass over every arm's training batch; return the example losses [b] of each arm.

        Gradients are added to the arms' tensors.
        """
        counts = [len(arm_batch.batch.indices) for arm_batch in arm_batches]
        scales = [arm_batch.scale for arm_batch, count in zip(arm_batches, counts, strict=True) for _ in range(count)]
        scale = torch.tensor(scales, device=self.loaded.device)
        result = self._compute_routed_losses("train", multi_lora, arm_batches, scale, backward=True)
        return list(torch.split(result.example_losses, counts))

    def _compute_routed_losses(
        self,
        split: SplitName,
        multi_lora: MultiLora,
        arm_batches: Sequence[ArmBatch],
        scale: Scale,
        *,
        backward: bool = False,
    ) -> BatchLoss:
        evaluator = self.evaluator
        with multi_lora.route(arm_batches, evaluator.pad_id, evaluator.fast_paths.sequence_packing) as (batch, routing):
            return evaluator.compute_losses(split, batch, scale, routing, backward=backward)

    def evaluate_adapters(
        self,
        split: SplitName,
        multi_lora: MultiLora,
        adapters: Sequence[str],
        indices_to_score: Sequence[int] | None = None,
    ) -> list[Scores]:
        """Score several adapters in one pass over the split, as `Evaluator.evaluate` scores one."""

        def compute(batch: Batch) -> BatchLoss:
            arm_batches = [ArmBatch(adapter, batch, 1.0, None) for adapter in adapters]
            return self._compute_routed_losses(split, multi_lora, arm_batches, 1.0)

        return self.evaluator.evaluate_together(split, compute, len(adapters), indices_to_score)

    def make_config(self, arm: Arm) -> LoraConfig:
        """Return PEFT's configuration of an arm's adapter."""
        targets = self.targets
        return make_lora_config(self.settings, arm, self.data.is_classification, targets.names, targets.parameters)

    def use_gradient_checkpointing(self) -> AbstractContextManager[None]:
        return use_gradient_checkpointing(self.model, self.settings)


def build_runtime(
    loaded: LoadedModel,
    data: EncodedData,
    settings: SelectSettings,
    steps: int,
    cache_folder: Path | None,
    targets: Targets | None = None,
) -> Runtime:
    """Build the runtime of a run.

    Args:
        steps: optimizer steps of an arm.
        cache_folder: the folder for the hidden states of the frozen prefix; None computes them in every step.
        targets: the targets of these settings, if they are already known.

    Raises:
        ModelError: the base's own code fails, it sees the tokens that follow, or PEFT cannot adapt it.
    """
    targets = targets or find_targets(loaded.model, settings, data.is_classification)
    trainable = [*(module.name for module in targets.modules), *settings.modules_to_save]
    cached_examples: dict[SplitName, set[int]] = {split: set(range(len(data.splits[split]))) for split in HELD_OUT}
    cached_examples["train"] = _find_expected_examples(data, settings, steps)
    evaluator = build_evaluator(
        loaded,
        data,
        settings,
        adapted_modules=trainable,
        cache_folder=cache_folder,
        cached_examples=cached_examples,
    )
    return Runtime(evaluator, settings, targets, steps)


def use_gradient_checkpointing(model: Any, settings: SelectSettings) -> AbstractContextManager[None]:
    """Recompute activations in the backward pass within the block, if the settings ask for it."""
    return enable_gradient_checkpointing(model) if settings.gradient_checkpointing else nullcontext()


def plan_training_batches(data: EncodedData, settings: SelectSettings, steps: int, seed: int) -> list[list[int]]:
    """Return the training batches of a training of `steps` with these settings."""
    return plan_batches(len(data.splits["train"]), settings.examples_per_step, steps, seed)


def _find_expected_examples(data: EncodedData, settings: SelectSettings, steps: int) -> set[int]:
    """Return the indices of the training examples that the arms will use."""
    longer = MOMENT_STEPS_FRACTION
    if settings.goal == "best-adapter":  # it trains twice the steps
        longer = 1.0
    first_seed, *other_seeds = settings.seeds
    plans = [plan_training_batches(data, settings, steps + math.ceil(longer * steps), first_seed)]
    plans += [plan_training_batches(data, settings, steps, seed) for seed in other_seeds]
    return {index for plan in plans for indices in plan for index in indices}
