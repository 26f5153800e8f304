"""Score rerankers and embedding models by the loss of their own trainer, for `SmallestAdapter` in sentence-transformers.

The trainer's loss is a function of a batch. If the loss of a batch is the mean of the losses of its rows, each row is an example. Otherwise, as
with in-batch negatives, the rows of a batch are compared with each other, and each batch is one example.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from rightrank.adapters.adapter_folders import PEFT_PREFIX, WEIGHTS_FILE
from rightrank.schema.errors import DataError, ModelError, describe_error, log_traceback
from rightrank.trainers.batch_scores import GROUP_KEY, Batch, count_rows
from rightrank.trainers.distributed import get_world_size
from rightrank.training.loss import BatchLoss

POINTWISE_TOLERANCE = 1e-3  # relative, between the loss of a batch and the mean of the losses of its rows


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
