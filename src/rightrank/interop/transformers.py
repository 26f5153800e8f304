"""For custom trainers: the loss of each held-out example of a language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from rightrank.adapters.batch_scores import batch_loss
from rightrank.runs.calls import TrialResult


@torch.no_grad()
def causal_example_losses(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> TrialResult:
    """The result of a task: the mean loss per label token, in nats, of each example and, as `loss`, of all.

    An example weighs as much as it has label tokens; one without any is left out.

    Args:
        model: a causal language model; it keeps its training mode.
        batches: collated as for training: `input_ids` and `labels` of shape (batch, length), labels -100 where no loss
            is computed.
    """
    was_training, losses, counts = model.training, [], []
    model.eval()
    for batch in batches:
        scored = batch_loss(model, batch)
        kept = scored.example_tokens > 0
        losses += scored.example_losses[kept].tolist()
        counts += scored.example_tokens[kept].tolist()
    model.train(was_training)
    scores = [loss / count for loss, count in zip(losses, counts, strict=True)]
    return TrialResult(metrics={"loss": sum(losses) / sum(counts)}, example_scores=scores, example_weights=counts)
