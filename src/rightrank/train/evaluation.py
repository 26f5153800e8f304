"""Held-out scores of a split, one per example."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import add
from typing import Any


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a split, in the split's order."""

    losses: list[float]  # nats, summed over the example's label tokens
    tokens: list[int]  # label tokens of the example; 1 where the loss is one of the whole example
    by_example: dict[str, list[float]] = field(default_factory=dict)  # metric → its value for each example

    @property
    def item_metrics(self) -> dict[str, list[float]]:
        """The metrics by example that a record has no field of its own for."""
        return {name: values for name, values in self.by_example.items() if name != "accuracy"}

    @property
    def fields(self) -> dict[str, Any]:
        """Those of the records that hold scores by example."""
        right = self.by_example.get("accuracy")  # classification only
        return {
            "item_losses": self.losses,
            "item_tokens": self.tokens,
            "item_correct": None if right is None else [round(value) for value in right],
            "item_metrics": self.item_metrics,
        }

    def with_others(self, other: Scores) -> Scores:
        """The scores of all examples, from those of some and of the others: what was left out is zero."""
        by_example = {name: list(map(add, each, other.by_example[name])) for name, each in self.by_example.items()}
        return Scores(list(map(add, self.losses, other.losses)), list(map(add, self.tokens, other.tokens)), by_example)

    @property
    def loss(self) -> float:
        """Token-weighted mean loss, nats per label."""
        return sum(self.losses) / sum(self.tokens)

    @property
    def metrics(self) -> dict[str, float]:
        return {"loss": self.loss} | {name: sum(each) / len(each) for name, each in self.by_example.items()}
