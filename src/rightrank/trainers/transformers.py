"""Compute the loss of each held-out example of a language model, for custom trainers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from rightrank.trainers.batch_scores import compute_batch_loss
from rightrank.trainers.calls import TrialResult


@torch.no_grad()
def causal_example_losses(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> TrialResult:
    """Return the result of a task: the mean loss per label token, in nats, of each example, and `loss` over all examples.

    An example is weighted by its number of label tokens. Examples without label tokens are left out.

    Args:
        model: a causal language model; its training mode is restored.
        batches: collated as for training: `input_ids` and `labels` of shape (batch, length), with labels -100 for tokens
            without a loss.
    """
    was_training, losses, counts = model.training, [], []
    model.eval()
    for batch in batches:
        batch_scores = compute_batch_loss(model, batch)
        has_tokens = batch_scores.example_tokens > 0
        losses += batch_scores.example_losses[has_tokens].tolist()
        counts += batch_scores.example_tokens[has_tokens].tolist()
    model.train(was_training)
    scores = [loss / count for loss, count in zip(losses, counts, strict=True)]
    return TrialResult(metrics={"loss": sum(losses) / sum(counts)}, example_scores=scores, example_weights=counts)
