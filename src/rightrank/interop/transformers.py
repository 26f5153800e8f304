"""Helpers for custom trainers: per-example losses, and a callback for the `Trainer` of transformers and TRL.

The module imports torch and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback

from rightrank.data.token_store import IGNORED
from rightrank.schema.trials import EvalPoint, TrialResult, TrialTask


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


@dataclass(eq=False, repr=False)
class RankSelectionCallback(TrainerCallback):
    """Collect a `TrialResult` from a `Trainer`: values during training, and per-example scores at the end.

    Example::

        callback = RankSelectionCallback("eval_loss", task=task, score_items=lambda model: causal_item_losses(model, batches))
        trainer.add_callback(callback)
        trainer.train()
        trainer.evaluate()
        return callback.result()
    """

    metric: str = "eval_loss"
    score_items: Callable[[Any], ItemScores] | None = None
    name: str = "loss"
    task: TrialTask | None = None  # receives each evaluation as it comes
    _points: dict[int, float] = field(default_factory=dict, init=False)
    _train_losses: list[float] = field(default_factory=list, init=False)
    _final: dict[str, float] = field(default_factory=dict, init=False)
    _items: ItemScores | None = field(default=None, init=False)
    _parameters: int = field(default=0, init=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._train_losses.append(float(logs["loss"]))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        if metrics and self.metric in metrics:
            self._points[state.global_step] = float(metrics[self.metric])
            if self.task is not None:
                self.task.report(state.global_step, float(metrics[self.metric]))
            self._final = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        if self.score_items is not None:
            self._items = self.score_items(model)

    def result(self) -> TrialResult:
        """The trial's result: the mean over examples if they were scored, else the trainer's last evaluation."""
        value = self._items.mean if self._items is not None else self._final.get(self.metric)
        metrics = dict(self._final) | ({self.name: value} if value is not None else {})
        train = self._train_losses[-1] if self._train_losses else None
        return TrialResult(
            metrics=metrics,
            item_scores=self._items.scores if self._items is not None else None,
            item_weights=self._items.weights if self._items is not None else None,
            train_value=train,
            points=[EvalPoint(step=step, value=value) for step, value in self._points.items()],
            trainable_parameters=self._parameters,
        )


def padded_batches(
    rows: Sequence[Mapping[str, Sequence[int]]], pad_id: int, batch_size: int
) -> list[dict[str, torch.Tensor]]:
    """Right-padded batches of `input_ids` and `labels` in the order of the rows, for `causal_item_losses`."""
    return [_padded(rows[start : start + batch_size], pad_id) for start in range(0, len(rows), batch_size)]


def _padded(rows: Sequence[Mapping[str, Sequence[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([[*row[name], *[fill] * (width - len(row[name]))] for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", pad_id), "labels": padded("labels", IGNORED), "attention_mask": mask}
