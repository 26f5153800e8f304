"""For custom trainers: the loss of each held-out example of a language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from rightrank.data.token_store import IGNORED
from rightrank.runs.calls import TrialResult


@torch.no_grad()
def causal_item_losses(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> TrialResult:
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
        on_device = {name: value.to(model.device) for name, value in batch.items()}
        labels = on_device.pop("labels")[:, 1:]
        logits = model(**on_device).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        tokens = (labels != IGNORED).sum(1)
        losses += (each.sum(1) / tokens.clamp(min=1)).tolist()
        counts += tokens.tolist()
    model.train(was_training)
    kept = [(loss, count) for loss, count in zip(losses, counts, strict=True) if count]
    scores, weights = map(list, zip(*kept, strict=True))
    mean = sum(loss * count for loss, count in kept) / sum(counts)
    return TrialResult(metrics={"loss": mean}, item_scores=scores, item_weights=weights)
