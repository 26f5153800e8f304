"""The evaluator: scores the examples of encoded data with a base model and whatever adapter is attached to it.

It knows nothing of a training: `training` uses it for the losses of its batches, and comparisons use it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from rightrank.bases.base_models import LoadedModel
from rightrank.data.splits import HELD_OUT
from rightrank.evaluation.batches import Batch, CacheBatches, batch_by_length, collate
from rightrank.evaluation.device import set_training_mode
from rightrank.evaluation.fast_paths import FastPaths, FrozenPrefix, RowRouting, find_fast_paths, find_frozen_blocks
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
from rightrank.evaluation.peft_models import use_adapter
from rightrank.evaluation.scores import Scores
from rightrank.evaluation.tokens import EXAMPLE_METRICS, EncodedData
from rightrank.schema.errors import ModelError, get_first_line, is_out_of_memory
from rightrank.schema.metrics import MetricSpec
from rightrank.schema.trials import SplitName


class EvaluationSettings(Protocol):
    """The settings that an evaluation reads; `SelectSettings` has them."""

    @property
    def batch_size(self) -> int: ...

    @property
    def eval_batch_size(self) -> int: ...

    @property
    def beta(self) -> float: ...

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def metric_specs(self) -> Sequence[MetricSpec]: ...

    def load_error_hint(self, default_hint: str) -> str: ...


def ignore_progress(_num_evaluated: int, _num_total: int) -> None:
    """Report no progress."""


@dataclass(eq=False, repr=False)
class Evaluator:
    """Scores examples of `data` with a base model; `build_evaluator` makes one."""

    loaded: LoadedModel
    data: EncodedData
    settings: EvaluationSettings
    likelihood: Objective  # the cross-entropies of labels
    fast_paths: FastPaths
    cached_examples: Mapping[SplitName, set[int]]
    # Receives the number of evaluated examples and the number of all examples.
    on_evaluated: Callable[[int, int], None] = field(default=ignore_progress)
    objective: Objective = field(init=False)
    _reference: Reference | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.objective = self.likelihood
        if isinstance(self.likelihood, Likelihood) and self.data.summary.form == "preference":
            batches = _make_cache_batches(self.data, self.cached_examples, self.settings)
            self.objective = PreferenceLoss(self.likelihood.labels, self.settings.beta)
            self._reference = Reference(batches, self._compute_log_probabilities)

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def pad_id(self) -> int:
        token_id: int = self.loaded.tokenizer.pad_token_id
        return token_id

    def make_batch(self, split: SplitName, indices: Sequence[int]) -> Batch:
        """Collate the examples at `indices` on the device, with the reference log-probabilities of preference pairs."""
        batch = _collate(self.loaded, self.data, split, indices)
        if self._reference is None:
            return batch
        return replace(batch, reference=self._reference.get_log_probabilities(split, indices))

    def compute_base_results(self, split: SplitName, indices: Iterable[int]) -> Iterator[list[int]]:
        """Compute the missing results of the base alone for these examples, in the batches in which they are computed on demand.

        These are the states of the frozen prefix, and the reference log-probabilities of preference pairs, which are computed from the prefix.

        Yields:
            The indices of each batch.
        """
        with self.fast_paths.use_attention():
            if self._reference is not None:
                yield from self._reference.compute_missing(split, indices)
            elif self.fast_paths.prefix is not None:
                yield from self.fast_paths.prefix.compute_missing(self.model, split, indices)

    @torch.no_grad()
    def _compute_log_probabilities(self, split: SplitName, indices: Sequence[int]) -> torch.Tensor:
        """Compute the log-probability of each sequence's labels [s] under the base, whichever adapter it carries."""
        batch = _collate(self.loaded, self.data, split, indices)
        with use_adapter(self.model, None), self.fast_paths.apply(self.model, split, batch) as rows:
            return -self.likelihood(self.model, rows, 1.0).example_losses

    def compute_losses(
        self, split: SplitName, batch: Batch, scale: Scale, routing: RowRouting | None = None, *, backward: bool = False
    ) -> BatchLoss:
        """Compute the losses of a batch with the adapter that is attached.

        Args:
            scale: the factor of every loss, or of each example [b].
            routing: assigns rows to adapters if several share the pass.
            backward: run the backward pass too.
        """
        with self.fast_paths.apply(self.model, split, batch, routing) as rows:
            result = self.objective(self.model, rows, scale)
            if backward:
                torch.autograd.backward(result.total)
        return result

    @torch.no_grad()
    def evaluate(self, split: SplitName, indices_to_score: Sequence[int] | None = None) -> Scores:
        """Score every example of a split, or those at `indices_to_score`, with the adapter that is attached, without its dropout.

        Batches have a fixed composition. Examples that are left out have zeros.
        """

        def compute(batch: Batch) -> BatchLoss:
            return self.compute_losses(split, batch, 1.0)

        with self.disable_dropout():
            return self.evaluate_together(split, compute, 1, indices_to_score)[0]

    @torch.no_grad()
    def evaluate_together(
        self,
        split: SplitName,
        compute: Callable[[Batch], BatchLoss],
        num_adapters: int,
        indices_to_score: Sequence[int] | None = None,
    ) -> list[Scores]:
        """Score several adapters in one pass over the split, as `evaluate` does.

        Args:
            compute: returns the losses of b examples with every adapter, [num_adapters · b].
        """
        examples = self.data.splits[split]
        batches = batch_by_length(examples, self.settings.eval_batch_size)
        if indices_to_score is not None:
            selected = set(indices_to_score)
            chosen = ([index for index in batch if index in selected] for batch in batches)
            batches = [batch for batch in chosen if batch]
        metrics = EXAMPLE_METRICS.get(self.data.summary.form, ())
        groups = self.data.groups.get(split)
        all_scores = [Scores.make_empty(len(examples), metrics, groups) for _ in range(num_adapters)]
        num_total = sum(map(len, batches))
        num_evaluated = 0
        for indices in batches:
            result = compute(self.make_batch(split, indices))
            for row, (scores, index) in enumerate(product(all_scores, indices)):
                scores.losses[index] = float(result.example_losses[row])
                scores.tokens[index] = int(result.example_tokens[row])
                for name, values in result.example_metrics.items():
                    scores.example_metrics[name][index] = float(values[row])
            num_evaluated += len(indices)
            self.on_evaluated(num_evaluated, num_total)
        return all_scores

    @contextmanager
    def disable_dropout(self) -> Iterator[None]:
        """Leave out dropout within the block."""
        dropouts = [module for module in self.model.modules() if isinstance(module, torch.nn.Dropout)]
        with set_training_mode(False, [module for module in dropouts if module.training]):
            yield


def build_evaluator(
    loaded: LoadedModel,
    data: EncodedData,
    settings: EvaluationSettings,
    *,
    adapted_modules: Sequence[str] = (),
    cache_folder: Path | None = None,
    cached_examples: Mapping[SplitName, set[int]] | None = None,
) -> Evaluator:
    """Build an evaluator with the fast paths that leave this model's losses on these data unchanged.

    Args:
        adapted_modules: names of the modules that adapters change, wholly or by an update. The blocks below them run once.
        cache_folder: the folder for the hidden states of these blocks; None runs them in every pass.
        cached_examples: the indices of the examples that will be used, for which results of the base are computed in common batches; None for
            all held-out examples.

    Raises:
        ModelError: the base's own code fails, or it sees the tokens that follow.
    """
    probe = _collate(loaded, data, "validation", batch_by_length(data.splits["validation"], settings.batch_size)[0])
    if data.is_classification:  # transformers uses it to find an example's last token
        loaded.model.config.get_text_config().pad_token_id = loaded.tokenizer.pad_token_id
    longest = _make_longest_batch(loaded, data)
    if _can_see_later_tokens(loaded, data, settings, probe, longest):
        raise ModelError(
            f"{loaded.name}: it sees the tokens that follow, so a label is visible where it is predicted, as in BERT; "
            "give a causal model, or `text` and `label` to train a classifier"
        )
    likelihood = make_likelihood(loaded.model, probe, data.is_classification)
    if cached_examples is None:
        cached_examples = {split: set(range(len(data.splits[split]))) for split in HELD_OUT}
    prefix: FrozenPrefix | None = None
    frozen_blocks = find_frozen_blocks(loaded.model, adapted_modules)
    if cache_folder is not None and frozen_blocks:
        batches = _make_cache_batches(data, cached_examples, settings)
        prefix = FrozenPrefix(frozen_blocks, batches, loaded.tokenizer.pad_token_id, loaded.device, cache_folder)
    fast_paths = find_fast_paths(loaded.model, likelihood, longest, probe, prefix)
    return Evaluator(loaded, data, settings, likelihood, fast_paths, cached_examples)


def _collate(loaded: LoadedModel, data: EncodedData, split: SplitName, indices: Sequence[int]) -> Batch:
    return collate(data.splits[split], indices, loaded.tokenizer.pad_token_id, loaded.device)


def _make_longest_batch(loaded: LoadedModel, data: EncodedData) -> Batch:
    """Collate the longest example of all with the shortest and the median of its split."""
    split, longest = max(data.splits.items(), key=lambda item: int(item[1].lengths.max(initial=0)))
    by_length: list[int] = np.argsort(longest.lengths, kind="stable").tolist()
    return _collate(loaded, data, split, [by_length[0], by_length[-1], by_length[len(by_length) // 2]])


def _make_cache_batches(
    data: EncodedData, cached_examples: Mapping[SplitName, set[int]], settings: EvaluationSettings
) -> dict[SplitName, CacheBatches]:
    """Return the batches in which results of the base alone are computed for the examples that will be used."""
    return {
        split: CacheBatches(examples, cached_examples.get(split, set()), settings.eval_batch_size)
        for split, examples in data.splits.items()
    }


@torch.no_grad()
def _can_see_later_tokens(
    loaded: LoadedModel, data: EncodedData, settings: EvaluationSettings, probe: Batch, longest: Batch
) -> bool:
    """Return whether a language model sees the labels that it predicts. This runs the base's first passes.

    Raises:
        ModelError: the base's own code fails.
    """
    try:
        loaded.model.base_model(input_ids=longest.input_ids, attention_mask=longest.attention_mask)  # without a head
        real = probe.input_ids[0][probe.attention_mask[0].bool()]
        return not data.is_classification and can_see_later_tokens(loaded.model, real)
    except (RuntimeError, ValueError, IndexError) as error:  # of kernels, of checks, and of tables of positions
        if is_out_of_memory(error):
            raise
        hint = settings.load_error_hint("check its config.json and its code, or give a smaller seq_len")
        raise ModelError(
            f"{loaded.name}: the base model fails without any adapter on texts of up to {longest.input_ids.shape[1]} tokens "
            f"({type(error).__name__}: {get_first_line(error)}); {hint}"
        ) from error
