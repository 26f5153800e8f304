"""For custom trainers: the loss of each held-out example of a language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rightrank.data.token_store import IGNORED


@dataclass(frozen=True, slots=True)
class ItemScores:
    """A score and a weight for each example, in the order of the examples."""

    scores: list[float]
    weights: list[float]

    @property
    def mean(self) -> float:
        return sum(s * w for s, w in zip(self.scores, self.weights, strict=True)) / sum(self.weights)


@torch.no_grad()
def causal_item_losses(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> ItemScores:
    """The mean loss per label token of each example, in nats, with its number of label tokens as the weight.

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
    kept = [(loss, float(count)) for loss, count in zip(losses, counts, strict=True) if count]
    return ItemScores([loss for loss, _ in kept], [count for _, count in kept])
