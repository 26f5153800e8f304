"""Score the examples in batches of another trainer with the losses of `training/loss.py`: language modelling, classification, and preferences.

A batch is the output of the trainer's own collator. Its tensors show its form: `completion_mask` for TRL's preference pairs, one label per
row for classification, else one label per token. Labels are never passed to the model, because fused losses then return no logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import torch

from rightrank.data.token_store import IGNORED
from rightrank.schema.errors import DataError, RightrankError, describe_error
from rightrank.trainers.distributed import gather_objects, get_process_index, get_world_size, is_sharded, sync_errors
from rightrank.training.evaluation import Scores
from rightrank.training.loss import (
    BatchLoss,
    Likelihood,
    PreferenceLoss,
    classification_loss,
    compute_native_pass_losses,
    get_base_model,
    use_adapter,
)

Batch = Mapping[str, Any]  # as the trainer's collator makes it
TrainerLossFunction: TypeAlias = Callable[[Batch], BatchLoss]  # the loss of a trainer that computes its own
BETA = 0.1  # of the loss of preference pairs, TRL's default


GROUP_KEY = "group"  # the key of a batch's groups: rows with equal numbers belong together
REFERENCE_KEYS = "ref_chosen_logps", "ref_rejected_logps"  # keys in TRL's batches of pairs
# Advice if examples cannot be scored here; see docs/how-to/own-trainers.md.
CUSTOM_EVALUATION_HINT = (
    'score adapters with your own function: rightrank.select_rank_with(train, "run", evaluate=evaluate, goal="adapter")'
)
NON_MODEL_KEYS = (GROUP_KEY, "labels", "num_items_in_batch", "completion_mask")
LIKELIHOOD = Likelihood(compute_native_pass_losses)


@dataclass(frozen=True, slots=True)
class TrainerBatch:
    """A batch of another trainer in the form of a `LabelledBatch`, which the losses read."""

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

    def split_pairs(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split values into those of chosen and rejected answers. TRL's collator puts all chosen answers first."""
        chosen, rejected = values.chunk(2)
        return chosen, rejected

    @property
    def examples(self) -> int:
        """Count the examples with a label."""
        if self.labels.dim() == 1:
            return len(self.labels)
        labelled = self.numbers[:, 1:][self.labels[:, 1:] != IGNORED]
        return len(set(labelled.tolist())) // (2 if self.is_pairs else 1)

    def get_example_groups(self, example_numbers: torch.Tensor) -> list[int]:
        """Return the groups of the examples with these numbers, or an empty list if the batch has no groups for exactly these rows."""
        if self.is_pairs or len(self.groups) != len(self.numbers):
            return list(self.groups) if len(self.groups) == len(example_numbers) else []
        return [self.groups[row] for row in self.rows[example_numbers.to(self.rows.device)].tolist()]

    def compute_loss(self, model: Any, beta: float) -> BatchLoss:
        """Compute the loss that belongs to the form of the batch."""
        if self.is_pairs:
            return PreferenceLoss(compute_native_pass_losses, beta)(model, self, 1.0)
        return (classification_loss if self.labels.dim() == 1 else LIKELIHOOD)(model, self, 1.0)


def read_batch(model: Any, batch: Batch) -> TrainerBatch:
    """Convert a trainer's batch to the inputs and labels of the losses, on the device of PEFT's model.

    Raises:
        DataError: The labels are neither one class per row nor one token per position, or an input is a container of tensors.
    """
    nested = next(
        (key for key, value in batch.items() if not isinstance(value, torch.Tensor) and _contains_tensor(value)), None
    )
    if nested is not None:
        raise DataError(
            f"the batches have {nested} as a {type(batch[nested]).__name__} of tensors, which can't be passed to the model; give a "
            f"collator that returns one tensor, or {CUSTOM_EVALUATION_HINT}"
        )
    base, device = get_base_model(model), next(model.parameters()).device
    tensors_by_key = {
        key: value for key, value in batch.items() if isinstance(value, torch.Tensor) and key not in REFERENCE_KEYS
    }
    tensors = {key: value.to(device) for key, value in tensors_by_key.items()}
    inputs: dict[str, Any] = {key: value for key, value in tensors.items() if key not in NON_MODEL_KEYS}
    if "use_cache" in inspect.signature(base.forward).parameters:
        inputs["use_cache"] = False
    is_pairs, labels, position_ids = "completion_mask" in batch, tensors.get("labels"), tensors.get("position_ids")
    if is_pairs:
        labels, position_ids = tensors["input_ids"].masked_fill(tensors["completion_mask"] == 0, IGNORED), None
    if labels is None or labels.is_floating_point() or not 1 <= labels.dim() <= 2:
        raise DataError(
            "the batches have no class or token labels; regression, several labels per row, rerankers, contrastive losses and custom losses "
            f"are not supported: {CUSTOM_EVALUATION_HINT}"
        )
    groups = batch[GROUP_KEY].tolist() if GROUP_KEY in batch else ()
    if not is_pairs and has_class_labels(batch):
        is_of_tokens = hasattr(base, "can_generate") and base.can_generate()
        if is_of_tokens or getattr(base.config, "num_labels", 2) == 1:
            output = "predicts tokens" if is_of_tokens else "has one output, like a regression or a reranker"
            raise DataError(
                f"{type(base).__name__} {output}, and the batches have one label per row, which is not supported: {CUSTOM_EVALUATION_HINT}"
            )
        rows = torch.arange(len(labels), device=device)
        return TrainerBatch(inputs, labels.flatten(), rows[:, None], rows, False, groups)
    if base.config.is_encoder_decoder or not base.can_generate():
        raise DataError(
            f"{type(base).__name__}: only causal language models and sequence classifiers are supported; for other models "
            f"{CUSTOM_EVALUATION_HINT}"
        )
    # Examples that are packed into one row begin where `position_ids` is 0. Of left-padded rows the padding has position 0 too, or 1: it
    # holds no label and makes no example.
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, 0] = True
    if position_ids is not None and position_ids.dim() == 2:
        starts |= position_ids.expand(len(labels), -1) == 0
    labels = labels.masked_fill(starts, IGNORED)  # no example predicts the first token of the next one
    numbers = (starts.flatten().cumsum(0) - 1).view(labels.shape)
    reference = torch.cat([batch[name] for name in REFERENCE_KEYS]) if REFERENCE_KEYS[0] in batch else None
    return TrainerBatch(inputs, labels, numbers, starts.nonzero()[:, 0], is_pairs, groups, reference)


def _contains_tensor(value: Any) -> bool:
    members = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, torch.Tensor) or any(map(_contains_tensor, members))


def compute_batch_loss(model: Any, batch: Batch, beta: float = BETA) -> BatchLoss:
    """Compute the losses of one batch; `beta` belongs to the loss of preference pairs, TRL's `sigmoid`.

    Raises:
        DataError: The model and the batch give no loss per example.
    """
    try:
        return read_batch(model, add_reference(model, batch)).compute_loss(model, beta)
    except RightrankError:
        raise
    except (AttributeError, ValueError) as error:
        raise DataError(
            f"{type(get_base_model(model)).__name__}: no loss per example can be computed from these batches ({describe_error(error)}); {CUSTOM_EVALUATION_HINT}"
        ) from error


@torch.no_grad()
def add_reference(model: Any, batch: Batch) -> Batch:
    """Add log-probabilities under the reference to preference pairs: the precomputed ones, or those of the adapter `ref` or of the base model."""
    if "completion_mask" not in batch or REFERENCE_KEYS[0] in batch:
        return batch
    with use_adapter(model, "ref" if "ref" in model.peft_config else None):
        losses = LIKELIHOOD(model, read_batch(model, batch), 1.0).example_losses
    return {**batch, **dict(zip(REFERENCE_KEYS, (-losses).chunk(2), strict=True))}


class HeldOutBatches:
    """Batches that one model scores repeatedly with different LoRA factors.

    The reference log-probabilities of pairs, which no factor changes, are computed once. With several processes, each one scores its share of the
    batches. If the model is sharded, all processes call it equally often.
    """

    def __init__(
        self, model: Any, batches: Sequence[Batch], beta: float = BETA, trainer_loss: TrainerLossFunction | None = None
    ) -> None:
        self._model, self._beta, self._trainer_loss = model, beta, trainer_loss
        self._batches = list(batches[get_process_index() :: get_world_size()])
        fewer = len(self._batches) < -(-len(batches) // get_world_size())
        self._in_step = batches[0] if fewer and is_sharded(model) else None

    @torch.no_grad()
    def score(self) -> Scores:
        """Return the scores of every example of all processes, in one order."""
        losses: list[float] = []
        tokens: list[int] = []
        correct: list[float] = []
        groups: list[int] = []
        with sync_errors():
            for number, batch in enumerate(self._batches):
                rows = None
                if self._trainer_loss is not None:
                    scored = self._trainer_loss(batch)
                else:
                    self._batches[number] = add_reference(self._model, batch)
                    rows = read_batch(self._model, self._batches[number])
                    scored = rows.compute_loss(self._model, self._beta)
                example_numbers = scored.example_tokens.nonzero()[:, 0]
                losses += scored.example_losses[example_numbers].tolist()
                tokens += scored.example_tokens[example_numbers].tolist()
                correct += scored.example_metrics.get("accuracy", torch.zeros(0)).tolist()
                groups += (
                    batch.get(GROUP_KEY, torch.zeros(0)).tolist()
                    if rows is None
                    else rows.get_example_groups(example_numbers)
                )
            if self._in_step is not None:
                compute_batch_loss(self._model, self._in_step, self._beta)
        losses, tokens, correct, groups = (
            list(chain(*lists)) for lists in zip(*gather_objects((losses, tokens, correct, groups)), strict=True)
        )
        by_example = {"accuracy": correct} if correct else {}
        return Scores(losses, tokens, by_example, groups if len(groups) == len(losses) else None)


def has_class_labels(batch: Batch) -> bool:
    """Return whether the labels are one class per row."""
    labels = batch["labels"]
    return bool(labels.dim() == 1 or labels.shape[1] == 1)


def count_rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def count_positions(batch: Batch) -> int:
    """Count the positions that a pass computes: tokens with padding, or rows if there are no tokens."""
    tokens = [value for key, value in batch.items() if key.endswith("input_ids") and isinstance(value, torch.Tensor)]
    return sum(value.numel() for value in tokens) or count_rows(batch)
