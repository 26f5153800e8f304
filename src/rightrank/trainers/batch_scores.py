"""Score the examples in batches of another trainer.

A batch is the output of the trainer's own collator. Its tensors show its form: `completion_mask` for TRL's preference pairs, one label per
row for classification, else one label per token. The losses are those of `training/loss.py`. Labels are never passed to the model, because
fused losses then return no logits.

Rerankers and embedding models of sentence-transformers are scored by the loss of their trainer. If the loss of a batch is the mean of the
losses of its rows, each row is an example. Otherwise, as with in-batch negatives, the rows of a batch are compared with each other, and
each batch is one example.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from rightrank.adapters.adapter_folders import PEFT_PREFIX, WEIGHTS_FILE
from rightrank.data.token_store import IGNORED
from rightrank.schema.errors import DataError, ModelError, RightrankError, describe_error, log_traceback
from rightrank.trainers.in_memory import get_world_size
from rightrank.training.loss import (
    BatchLoss,
    Likelihood,
    PreferenceLoss,
    classification_loss,
    compute_native_pass_losses,
    get_base_model,
    use_adapter,
)

Batch: TypeAlias = Mapping[str, Any]  # as the trainer's collator makes it
BETA = 0.1  # of the loss of preference pairs, TRL's default
POINTWISE_TOLERANCE = 1e-3  # relative, between the loss of a batch and the mean of the losses of its rows
GROUP_KEY = "group"  # the key of a batch's groups: rows with equal numbers belong together
REFERENCE_KEYS = "ref_chosen_logps", "ref_rejected_logps"  # keys in TRL's batches of pairs
# Advice if examples cannot be scored here; see docs/how-to/own-trainers.md.
CUSTOM_EVALUATION_HINT = (
    'score adapters with your own function: rightrank.select_rank_with(train, "run", evaluate=evaluate, goal="adapter")'
)
NON_MODEL_KEYS = (GROUP_KEY, "labels", "num_items_in_batch", "completion_mask", *REFERENCE_KEYS)
LIKELIHOOD = Likelihood(compute_native_pass_losses)


@dataclass(frozen=True, slots=True)
class TrainerBatch:
    """A batch of another trainer in the form of a `LabelledBatch`, which the losses read."""

    inputs: Mapping[str, Any]
    labels: torch.Tensor
    numbers: torch.Tensor  # [rows, n]
    rows: torch.Tensor  # [s]: of each sequence
    is_pairs: bool
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

    def get_example_groups(self, groups: list[int], example_numbers: torch.Tensor) -> list[int]:
        """Return the groups of the examples with these numbers from the groups of rows or of examples; empty if they are of neither."""
        if len(groups) == len(self.numbers):
            return [groups[row] for row in self.rows[example_numbers.to(self.rows.device)].tolist()]
        return groups if len(groups) == len(example_numbers) else []

    def compute_loss(self, model: Any, beta: float) -> BatchLoss:
        """Compute the loss that belongs to the form of the batch."""
        if self.is_pairs:
            return PreferenceLoss(compute_native_pass_losses, beta)(model, self, 1.0)
        return (classification_loss if self.labels.dim() == 1 else LIKELIHOOD)(model, self, 1.0)


def read_batch(model: Any, batch: Batch) -> TrainerBatch:
    """Convert a trainer's batch to the inputs and labels of the losses, on the device of PEFT's model.

    Raises:
        DataError: The labels are neither one class per row nor one token per position, the model does not predict them, or an input is a
            container of tensors.
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
    tensors = {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
    inputs: dict[str, Any] = {key: value for key, value in tensors.items() if key not in NON_MODEL_KEYS}
    if "use_cache" in inspect.signature(base.forward).parameters:
        inputs["use_cache"] = False
    is_pairs, labels, position_ids = "completion_mask" in batch, tensors.get("labels"), tensors.get("position_ids")
    if is_pairs:
        labels, position_ids = tensors["input_ids"].masked_fill(tensors["completion_mask"] == 0, IGNORED), None
    has_classes = not is_pairs and labels is not None and has_class_labels(batch)
    if labels is None or labels.is_floating_point() or labels.dim() > 2 or not _predicts_labels(base, has_classes):
        raise DataError(
            f"{type(base).__name__}: only causal language models with one label per token and classifiers with one class per row are scored "
            f"here, and no regression, reranker, contrastive or custom loss: {CUSTOM_EVALUATION_HINT}"
        )
    if has_classes:
        rows = torch.arange(len(labels), device=device)
        return TrainerBatch(inputs, labels.flatten(), rows[:, None], rows, False)
    # Examples that are packed into one row begin where `position_ids` is 0. Of left-padded rows the padding has position 0 too, or 1: it
    # holds no label and makes no example.
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, 0] = True
    if position_ids is not None and position_ids.dim() == 2:
        starts |= position_ids.expand(len(labels), -1) == 0
    labels = labels.masked_fill(starts, IGNORED)  # no example predicts the first token of the next one
    numbers = (starts.flatten().cumsum(0) - 1).view(labels.shape)
    reference = torch.cat([batch[name] for name in REFERENCE_KEYS]) if REFERENCE_KEYS[0] in batch else None
    return TrainerBatch(inputs, labels, numbers, starts.nonzero()[:, 0], is_pairs, reference)


def _predicts_labels(base: Any, has_classes: bool) -> bool:
    predicts_tokens = hasattr(base, "can_generate") and base.can_generate()
    if has_classes:
        # One output is that of a regression or a reranker. Its cross-entropy would be 0 at every rank.
        return not predicts_tokens and getattr(base.config, "num_labels", 2) > 1
    return predicts_tokens and not base.config.is_encoder_decoder


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


def is_sentence_transformers(trainer: Any) -> bool:
    """Return whether a trainer is one of sentence-transformers, which computes its own loss."""
    return any(kind.__module__.partition(".")[0] == "sentence_transformers" for kind in type(trainer).__mro__)


class AdaptedModel(torch.nn.Module):
    """PEFT's interface of the adapter inside a model of sentence-transformers."""

    def __init__(self, complete: Any, base: Any) -> None:
        super().__init__()
        self.complete, self._base = complete, [base]  # a list, because no module is registered twice
        self.peft_config, self.config = base.peft_config, base.config

    @property
    def model(self) -> Any:
        return self._base[0]

    @property
    def base_model(self) -> Any:
        return self

    def get_base_model(self) -> Any:
        return self.model

    def save_pretrained(self, folder: str, *, selected_adapters: Sequence[str], **_: Any) -> None:
        """Save one adapter in the files and with the names of PEFT."""
        (name,) = selected_adapters
        target = Path(folder) / ("" if name == "default" else name)
        target.mkdir(exist_ok=True)
        tensors = get_peft_model_state_dict(self.model, adapter_name=name)
        save_file({f"{PEFT_PREFIX}{key}": value.contiguous() for key, value in tensors.items()}, target / WEIGHTS_FILE)
        self.peft_config[name].save_pretrained(str(target))


def find_adapted_model(model: Any) -> AdaptedModel:
    """Return the interface of the adapter that `add_adapter` injected into a model, or that PEFT wrapped inside it.

    Raises:
        ModelError: there is no adapter, or there are several processes.
    """
    if get_world_size() > 1:
        raise ModelError("rerankers and embedding models are measured in one process; train in one, or use evaluate=")
    peft_model = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    base = model.transformers_model if peft_model is None else peft_model.get_base_model()
    if not getattr(base, "peft_config", None):
        raise ModelError(
            "the model has no PEFT adapter; add one by get_peft_model or model.add_adapter(LoraConfig(...))"
        )
    return AdaptedModel(model, base)


@dataclass(frozen=True, slots=True)
class TrainerLoss:
    """The loss of a trainer of sentence-transformers, as a function of a batch of its collator."""

    trainer: Any
    is_pointwise: bool = False  # whether the loss of a batch is the mean of the losses of its rows

    def __call__(self, batch: Batch) -> BatchLoss:
        """Compute the loss of a batch, which counts as one example."""
        inputs = self.trainer._prepare_inputs({key: value for key, value in batch.items() if key != GROUP_KEY})
        with self.trainer.compute_loss_context_manager():
            total = self.trainer.compute_loss(self.trainer.model, inputs) * count_rows(batch)
        return BatchLoss(total, total.detach().float().cpu()[None], torch.tensor([count_rows(batch)]))

    @torch.no_grad()
    def compare_rows(self, batch: Batch, row_batches: Sequence[Batch]) -> TrainerLoss:
        """Return the loss with `is_pointwise` as the loss of a batch and of its rows show it.

        Raises:
            DataError: the loss cannot be computed from the batch.
        """
        try:
            batch_loss = float(self(batch).example_losses) / count_rows(batch)
            mean_row_loss = sum(float(self(row_batch).example_losses) for row_batch in row_batches) / len(row_batches)
        except (RuntimeError, ValueError) as error:
            log_traceback(error)
            name = type(self.trainer.loss).__name__
            raise DataError(
                f"{name}: no loss can be computed from the held-out rows ({describe_error(error)}); give rows like those of "
                "the training"
            ) from error
        return replace(
            self, is_pointwise=math.isclose(batch_loss, mean_row_loss, rel_tol=POINTWISE_TOLERANCE, abs_tol=1e-6)
        )
