"""The runtime of a run: the base, the encoded data, the objective and the fast paths that all arms share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig

from rightrank.bases.base_models import LoadedModel
from rightrank.evaluation.batches import Batch, CacheBatches, batch_by_length, collate
from rightrank.evaluation.device import enable_gradient_checkpointing, set_training_mode
from rightrank.evaluation.fast_paths import FastPaths, FrozenPrefix, find_fast_paths, find_frozen_blocks
from rightrank.evaluation.loss import (
    BatchLoss,
    Likelihood,
    Objective,
    PreferenceLoss,
    Reference,
    Scale,
    can_see_later_tokens,
    make_likelihood,
)
from rightrank.evaluation.peft_models import ADAPTER, use_adapter
from rightrank.evaluation.scores import Scores
from rightrank.evaluation.tokens import EXAMPLE_METRICS, EncodedData
from rightrank.schema.errors import InterruptedRun, ModelError, get_first_line, is_out_of_memory
from rightrank.schema.events import EvaluationProgress
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, SplitName
from rightrank.training.multi_lora import ArmBatch, MultiLora, Routing
from rightrank.training.targets import Targets, find_targets, make_lora_config

MOMENT_STEPS_FRACTION = 0.1  # additional steps whose examples give the moments of a truncation


def plan_batches(examples: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Draw `steps` batches of `batch_size` example indices in passes over all examples.

    If a pass ends within a batch, the next pass completes the batch.
    """
    generator = np.random.default_rng([seed, 0x8A7C])
    needed = batch_size * steps
    order = np.concatenate([generator.permutation(examples)[:needed] for _ in range(-(-needed // examples))])
    plan: list[list[int]] = order[:needed].reshape(steps, batch_size).tolist()
    return plan


class Runtime:
    """The base and the data of a run. It is built once; its methods work with and without an adapter on the base.

    Args:
        steps: optimizer steps of an arm.
        cache_folder: the folder for the hidden states of the frozen prefix; None computes them in every step.
        targets: the targets of these settings, if they are already known.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        data: EncodedData,
        settings: SelectSettings,
        steps: int,
        cache_folder: Path | None,
        targets: Targets | None = None,
    ) -> None:
        self.loaded = loaded
        self.data = data
        self.settings = settings
        self.model = loaded.model
        self.targets = targets or find_targets(self.model, settings, data.is_classification)
        self.steps = steps
        self._pad_id: int = loaded.tokenizer.pad_token_id
        probe = self._collate("validation", batch_by_length(data.splits["validation"], settings.batch_size)[0])
        if data.is_classification:  # transformers uses it to find an example's last token
            self.model.config.get_text_config().pad_token_id = self._pad_id
        longest = self._make_longest_batch()
        if self._can_see_later_tokens(probe, longest):
            raise ModelError(
                f"{loaded.name}: it sees the tokens that follow, so a label is visible where it is predicted, as in BERT; "
                "give a causal model, or `text` and `label` to train a classifier"
            )
        self._likelihood = make_likelihood(self.model, probe, data.is_classification)
        self.fast_paths = self._find_fast_paths(probe, longest, cache_folder)
        self.objective: Objective = self._likelihood
        # Receives the number of evaluated examples and the number of all examples.
        self.on_evaluated: Callable[[int, int], None] = lambda _done, _of: None
        self._reference: Reference | None = None
        if isinstance(self._likelihood, Likelihood) and data.summary.form == "preference":
            self.objective = PreferenceLoss(self._likelihood.labels, settings.beta)
            self._reference = Reference(self._make_cache_batches(), self._compute_log_probabilities)

    def prepare(self, on_progress: Callable[[EvaluationProgress], None], should_stop: Callable[[], bool]) -> None:
        """Compute the results of the base alone for the training examples that the arms will use, and report progress.

        These are the states of the frozen prefix, and the reference log-probabilities of preference pairs.

        Raises:
            InterruptedRun: `should_stop` returned True.
        """
        start_time = time.perf_counter()
        expected = self._find_expected_examples("train")
        num_done = 0
        for group in self.compute_base_results("train", expected):
            num_done += len(group)
            seconds = time.perf_counter() - start_time
            label = "frozen layers, once for all trials"
            on_progress(
                EvaluationProgress(label=label, examples=num_done, total_examples=len(expected), seconds=seconds)
            )
            if should_stop():
                raise InterruptedRun("stopped before the first training")

    def compute_base_results(self, split: SplitName, indices: Iterable[int]) -> Iterator[list[int]]:
        """Compute the missing results of the base alone for these examples, in the batches in which they are computed on demand.

        Yields:
            The indices of each batch. Reference log-probabilities are computed from the prefix.
        """
        with self.fast_paths.use_attention():
            if self._reference is not None:
                yield from self._reference.compute_missing(split, indices)
            elif self.fast_paths.prefix is not None:
                yield from self.fast_paths.prefix.compute_missing(self.model, split, indices)

    def make_batch(self, split: SplitName, indices: Sequence[int]) -> Batch:
        """Collate the examples at `indices` on the device, with the reference log-probabilities of preference pairs."""
        batch = self._collate(split, indices)
        return (
            batch
            if self._reference is None
            else replace(batch, reference=self._reference.get_log_probabilities(split, indices))
        )

    def _collate(self, split: SplitName, indices: Sequence[int]) -> Batch:
        return collate(self.data.splits[split], indices, self._pad_id, self.loaded.device)

    @torch.no_grad()
    def _compute_log_probabilities(self, split: SplitName, indices: Sequence[int]) -> torch.Tensor:
        """Compute the log-probability of each sequence's labels [s] under the base, whichever adapter it carries."""
        batch = self._collate(split, indices)
        with use_adapter(self.model, None), self.fast_paths.apply(self.model, split, batch) as rows:
            return -self._likelihood(self.model, rows, 1.0).example_losses

    def plan_batches(self, seed: int, steps: int | None = None) -> list[list[int]]:
        """Return the training batches of every arm of `seed`: one list of example indices per optimizer step.

        A plan with more steps begins with the plan with fewer steps.
        """
        steps = self.steps if steps is None else steps
        return plan_batches(len(self.data.splits["train"]), self.settings.examples_per_step, steps, seed)

    def compute_losses(
        self, split: SplitName, batch: Batch, scale: Scale, routing: Routing | None = None, *, backward: bool = False
    ) -> BatchLoss:
        with self.fast_paths.apply(self.model, split, batch, routing) as rows:
            result = self.objective(self.model, rows, scale)
            if backward:
                torch.autograd.backward(result.total)
        return result

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
        with multi_lora.route(arm_batches, self._pad_id, self.fast_paths.sequence_packing) as (batch, routing):
            return self.compute_losses(split, batch, scale, routing, backward=backward)

    @torch.no_grad()
    def evaluate(self, split: SplitName, indices_to_score: Sequence[int] | None = None) -> Scores:
        """Score every example of a split, or those at `indices_to_score`, without adapter dropout.

        Batches have a fixed composition. Examples that are left out have zeros.
        """
        with self.disable_dropout():
            return self.evaluate_adapters(split, None, [ADAPTER], indices_to_score)[0]

    @torch.no_grad()
    def evaluate_adapters(
        self,
        split: SplitName,
        multi_lora: MultiLora | None,
        adapters: Sequence[str],
        indices_to_score: Sequence[int] | None = None,
    ) -> list[Scores]:
        """Score several adapters in one pass over the split, as `evaluate` does. Without `multi_lora`, score the current adapter."""
        examples, names = self.data.splits[split], EXAMPLE_METRICS.get(self.data.summary.form, ())
        batches = batch_by_length(examples, self.settings.eval_batch_size)
        if indices_to_score is not None:
            selected = set(indices_to_score)
            batches = [here for batch in batches if (here := [index for index in batch if index in selected])]
        count, groups = len(examples), self.data.groups.get(split)
        scores = [Scores([0.0] * count, [0] * count, {name: [0.0] * count for name in names}, groups) for _ in adapters]
        num_done, num_examples = 0, sum(map(len, batches))
        for indices in batches:
            batch = self.make_batch(split, indices)
            if multi_lora is None:
                result = self.compute_losses(split, batch, 1.0)
            else:
                arm_batches = [ArmBatch(adapter, batch, 1.0, None) for adapter in adapters]
                result = self._compute_routed_losses(split, multi_lora, arm_batches, 1.0)
            for row, (score, index) in enumerate(product(scores, indices)):
                score.losses[index] = float(result.example_losses[row])
                score.tokens[index] = int(result.example_tokens[row])
                for name, values in result.example_metrics.items():
                    score.example_metrics[name][index] = float(values[row])
            num_done += len(indices)
            self.on_evaluated(num_done, num_examples)
        return scores

    def make_config(self, arm: Arm) -> LoraConfig:
        targets, classification = self.targets, self.data.is_classification
        return make_lora_config(self.settings, arm, classification, targets.names, targets.parameters)

    def use_gradient_checkpointing(self) -> AbstractContextManager[None]:
        return enable_gradient_checkpointing(self.model) if self.settings.gradient_checkpointing else nullcontext()

    @contextmanager
    def disable_dropout(self) -> Iterator[None]:
        dropouts = [module for module in self.model.modules() if isinstance(module, torch.nn.Dropout)]
        with set_training_mode(False, [module for module in dropouts if module.training]):
            yield

    @torch.no_grad()
    def _can_see_later_tokens(self, probe: Batch, longest: Batch) -> bool:
        """Return whether a language model sees the labels that it predicts. This runs the base's first passes.

        Raises:
            ModelError: the base's own code fails.
        """
        try:
            self.model.base_model(input_ids=longest.input_ids, attention_mask=longest.attention_mask)  # without a head
            real = probe.input_ids[0][probe.attention_mask[0].bool()]
            return not self.data.is_classification and can_see_later_tokens(self.model, real)
        except (RuntimeError, ValueError, IndexError) as error:  # of kernels, of checks, and of tables of positions
            if is_out_of_memory(error):
                raise
            hint = self.settings.load_error_hint("check its config.json and its code, or give a smaller seq_len")
            raise ModelError(
                f"{self.loaded.name}: the base model fails without any adapter on texts of up to {longest.input_ids.shape[1]} tokens "
                f"({type(error).__name__}: {get_first_line(error)}); {hint}"
            ) from error

    def _find_fast_paths(self, probe: Batch, longest: Batch, cache_folder: Path | None) -> FastPaths:
        """Find the fast paths of the model. The frozen prefix consists of the blocks below all trainable modules."""
        trainable = [*(module.name for module in self.targets.modules), *self.settings.modules_to_save]
        prefix: FrozenPrefix | None = None
        if cache_folder is not None and (blocks := find_frozen_blocks(self.model, trainable)):
            batches, device = self._make_cache_batches(), self.loaded.device
            prefix = FrozenPrefix(blocks, batches, self._pad_id, device, cache_folder)
        return find_fast_paths(self.model, self._likelihood, longest, probe, prefix)

    def _make_longest_batch(self) -> Batch:
        """Collate the longest example of all with the shortest and the median of its split."""
        split, longest = max(self.data.splits.items(), key=lambda item: int(item[1].lengths.max(initial=0)))
        by_length: list[int] = np.argsort(longest.lengths, kind="stable").tolist()
        return self._collate(split, [by_length[0], by_length[-1], by_length[len(by_length) // 2]])

    def _make_cache_batches(self) -> dict[SplitName, CacheBatches]:
        """Return the batches in which results of the base alone are computed for the examples that the arms will use."""
        return {
            split: CacheBatches(examples, self._find_expected_examples(split), self.settings.eval_batch_size)
            for split, examples in self.data.splits.items()
        }

    def _find_expected_examples(self, split: SplitName) -> set[int]:
        """Return the indices of a split's examples that the arms will use."""
        if split != "train":
            return set(range(len(self.data.splits[split])))
        longer = 1.0 if self.settings.goal == "best-adapter" else MOMENT_STEPS_FRACTION  # it trains twice the steps
        extended_steps = self.steps + math.ceil(longer * self.steps)
        plans = [
            self.plan_batches(self.settings.seeds[0], extended_steps),
            *map(self.plan_batches, self.settings.seeds[1:]),
        ]
        return {index for plan in plans for indices in plan for index in indices}
