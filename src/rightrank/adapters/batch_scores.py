"""Scores of the examples in another trainer's batches, by the losses of `train/loss.py`: of language, of labels, and of preference pairs.

A batch is what the trainer's own collator makes. Its form shows in its tensors: `completion_mask` for TRL's preference pairs, one label a
row for classification, else one label a token. Labels never reach the model, since fused losses return no logits when they get them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from rightrank.adapters.processes import gather_objects, is_sharded, process_index, together, world_size
from rightrank.data.token_store import IGNORED
from rightrank.schema.errors import DataError, RightrankError, described
from rightrank.train.evaluation import Scores
from rightrank.train.loss import (
    BatchLoss,
    Likelihood,
    PreferenceLoss,
    classification_loss,
    compute_native_pass_losses,
    get_base_model,
    use_adapter,
)

Batch = Mapping[str, Any]  # as the trainer's collator makes it
BETA = 0.1  # of preference pairs, as TRL's default


GROUP = "group"  # of a batch's rows: numbers that say which of all rows belong together
REFERENCE = "ref_chosen_logps", "ref_rejected_logps"  # of TRL's batches of pairs
# What to do where examples cannot be scored here; see docs/how-to/own-trainers.md.
OWN_EVALUATION = 'score adapters with a function of your own: rightrank.select_rank_with(train, "run", evaluate=evaluate, goal="adapter")'
NOT_FOR_THE_MODEL = (GROUP, "labels", "num_items_in_batch", "completion_mask")
LIKELIHOOD = Likelihood(compute_native_pass_losses)


@dataclass(frozen=True, slots=True)
class TrainerBatch:
    """A batch of another trainer's, as the losses read it: a `LabelledBatch`."""

    inputs: Mapping[str, Any]
    labels: torch.Tensor
    numbers: torch.Tensor  # [rows, n]
    rows: torch.Tensor  # [s]: of each sequence
    is_pairs: bool
    groups: Sequence[int]  # of the batch's rows, or of its examples; empty where it says none
    reference: torch.Tensor | None = None  # [s], of pairs

    @property
    def sequences(self) -> int:
        return len(self.rows)

    def sequence_numbers(self) -> torch.Tensor:
        return self.numbers

    def pairs(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """TRL's collator puts all chosen answers before all rejected ones."""
        chosen, rejected = values.chunk(2)
        return chosen, rejected

    @property
    def examples(self) -> int:
        """Those with a label."""
        if self.labels.dim() == 1:
            return len(self.labels)
        labelled = self.numbers[:, 1:][self.labels[:, 1:] != IGNORED]
        return len(set(labelled.tolist())) // (2 if self.is_pairs else 1)

    def example_groups(self, kept: torch.Tensor) -> list[int]:
        """Of the examples with these numbers; empty where the batch has none, or its rows are others than those that have."""
        if self.is_pairs or len(self.groups) != len(self.numbers):
            return list(self.groups) if len(self.groups) == len(kept) else []
        return [self.groups[row] for row in self.rows[kept.to(self.rows.device)].tolist()]

    def loss(self, model: Any, beta: float) -> BatchLoss:
        """By the objective of its form."""
        if self.is_pairs:
            return PreferenceLoss(compute_native_pass_losses, beta)(model, self, 1.0)
        return (classification_loss if self.labels.dim() == 1 else LIKELIHOOD)(model, self, 1.0)


def read_batch(model: Any, batch: Batch) -> TrainerBatch:
    """What the losses read of a batch, on the device of PEFT's model.

    Raises:
        DataError: labels of another form than one class a row or one token a position, or an input that is no tensor but holds some.
    """
    nested = next(
        (key for key, value in batch.items() if not isinstance(value, torch.Tensor) and _holds_tensor(value)), None
    )
    if nested is not None:
        raise DataError(
            f"the batches have {nested} as a {type(batch[nested]).__name__} of tensors, without which the model would be another one; give a "
            f"collator that makes a tensor of it, or {OWN_EVALUATION}"
        )
    base, device = get_base_model(model), next(model.parameters()).device
    given = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor) and key not in REFERENCE}
    tensors = {key: value.to(device) for key, value in given.items()}
    inputs: dict[str, Any] = {key: value for key, value in tensors.items() if key not in NOT_FOR_THE_MODEL}
    if "use_cache" in inspect.signature(base.forward).parameters:
        inputs["use_cache"] = False
    is_pairs, labels, positions = "completion_mask" in batch, tensors.get("labels"), tensors.get("position_ids")
    if is_pairs:
        labels, positions = tensors["input_ids"].masked_fill(tensors["completion_mask"] == 0, IGNORED), None
    if labels is None or labels.is_floating_point() or not 1 <= labels.dim() <= 2:
        raise DataError(
            "the batches have no labels of classes or tokens; a regression, several labels a row, a reranker, a contrastive loss or a loss of one's "
            f"own has no scores here: {OWN_EVALUATION}"
        )
    groups = batch[GROUP].tolist() if GROUP in batch else ()
    if not is_pairs and is_of_classes(batch):
        is_of_tokens = hasattr(base, "can_generate") and base.can_generate()
        if is_of_tokens or getattr(base.config, "num_labels", 2) == 1:
            output = "predicts tokens" if is_of_tokens else "has one output, as a regression or a reranker"
            raise DataError(
                f"{type(base).__name__} {output}, and the batches have one label a row, which has no scores here: {OWN_EVALUATION}"
            )
        rows = torch.arange(len(labels), device=device)
        return TrainerBatch(inputs, labels.flatten(), rows[:, None], rows, False, groups)
    if base.config.is_encoder_decoder or not base.can_generate():
        raise DataError(
            f"{type(base).__name__}: examples are scored of causal language models and of classifiers of whole rows; for others "
            f"{OWN_EVALUATION}"
        )
    # Examples that are packed into one row begin where `position_ids` is 0. Of left-padded rows the padding has position 0 too, or 1: it
    # holds no label and makes no example.
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, 0] = True
    if positions is not None and positions.dim() == 2:
        starts |= positions.expand(len(labels), -1) == 0
    labels = labels.masked_fill(starts, IGNORED)  # no example predicts the first token of the next one
    numbers = (starts.flatten().cumsum(0) - 1).view(labels.shape)
    reference = torch.cat([batch[name] for name in REFERENCE]) if REFERENCE[0] in batch else None
    return TrainerBatch(inputs, labels, numbers, starts.nonzero()[:, 0], is_pairs, groups, reference)


def _holds_tensor(value: Any) -> bool:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, torch.Tensor) or any(map(_holds_tensor, parts))


def batch_loss(model: Any, batch: Batch, beta: float = BETA) -> BatchLoss:
    """Return the losses of one batch; `beta` is that of the loss of preference pairs, TRL's `sigmoid`.

    Raises:
        DataError: the model and the batch give no loss by example.
    """
    try:
        return read_batch(model, with_reference(model, batch)).loss(model, beta)
    except RightrankError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"{type(get_base_model(model)).__name__}: these batches give no loss by example ({described(error)}); {OWN_EVALUATION}"
        ) from error


@torch.no_grad()
def with_reference(model: Any, batch: Batch) -> Batch:
    """Pairs with their log-probabilities under the reference: precomputed, of the adapter `ref`, or of the base."""
    if "completion_mask" not in batch or REFERENCE[0] in batch:
        return batch
    with use_adapter(model, "ref" if "ref" in model.peft_config else None):
        losses = LIKELIHOOD(model, read_batch(model, batch), 1.0).example_losses
    return {**batch, **dict(zip(REFERENCE, (-losses).chunk(2), strict=True))}


class HeldOutBatches:
    """Batches that one model scores again and again, with other LoRA factors each time.

    The reference of pairs, which no factor changes, is computed once. With several processes each scores its share of the batches; where
    the model is sharded all of them call it equally often.
    """

    def __init__(self, model: Any, batches: Sequence[Batch], beta: float = BETA) -> None:
        self._model, self._beta = model, beta
        self._batches = list(batches[process_index() :: world_size()])
        fewer = len(self._batches) < -(-len(batches) // world_size())
        self._in_step = batches[0] if fewer and is_sharded(model) else None

    @torch.no_grad()
    def scores(self) -> Scores:
        """The scores of every example of all processes, in one order."""
        losses: list[float] = []
        tokens: list[int] = []
        correct: list[float] = []
        groups: list[int] = []
        with together():
            for number, batch in enumerate(self._batches):
                self._batches[number] = with_reference(self._model, batch)
                rows = read_batch(self._model, self._batches[number])
                scored = rows.loss(self._model, self._beta)
                kept = scored.example_tokens.nonzero()[:, 0]
                losses += scored.example_losses[kept].tolist()
                tokens += scored.example_tokens[kept].tolist()
                correct += scored.example_metrics.get("accuracy", torch.zeros(0)).tolist()
                groups += rows.example_groups(kept)
            if self._in_step is not None:
                batch_loss(self._model, self._in_step, self._beta)
        losses, tokens, correct, groups = (
            list(chain(*parts)) for parts in zip(*gather_objects((losses, tokens, correct, groups)), strict=True)
        )
        by_example = {"accuracy": correct} if correct else {}
        return Scores(losses, tokens, by_example, groups if len(groups) == len(losses) else None)


def is_of_classes(batch: Batch) -> bool:
    """Whether the labels are one class a row."""
    labels = batch["labels"]
    return bool(labels.dim() == 1 or labels.shape[1] == 1)


def positions(batch: Batch) -> int:
    """The positions that a pass computes: tokens with padding, or rows where there are none."""
    tokens = batch.get("input_ids")
    return len(batch["labels"]) if tokens is None else int(tokens.numel())
