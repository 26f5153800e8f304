"""Held-out scores of a split, one per example, and the metrics that are measured beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import add
from typing import Any

from rightrank.schema.errors import MetricError


@dataclass(frozen=True, slots=True)
class Measured:
    """Metrics by name, with the scores of examples whose mean they are, and the reasons why some failed."""

    values: dict[str, float] = field(default_factory=dict)
    items: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def require(self, names: Sequence[str]) -> None:
        """Check that these metrics have a value.

        Raises:
            MetricError: one of them failed.
        """
        reason = next((self.failed[name] for name in names if name in self.failed), None)
        if reason is not None:
            raise MetricError(f"{reason}; trained adapters are kept: fix the cause and run the same command again")


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a split, in the split's order."""

    losses: list[float]  # nats, summed over the example's label tokens
    tokens: list[int]  # label tokens of the example; 1 where the loss is one of the whole example
    by_example: dict[str, list[float]] = field(default_factory=dict)  # metric → its value for each example
    groups: list[int] | None = None  # which examples belong together; None: each stands for itself

    def fields(self, measured: Measured) -> dict[str, Any]:
        """Those of the records that hold scores by example, with the metrics measured beside them."""
        by_example = dict(self.by_example)
        right = by_example.pop("accuracy", None)  # classification only, with a field of its own
        return {
            "item_losses": self.losses,
            "item_tokens": self.tokens,
            "item_correct": None if right is None else [round(value) for value in right],
            "item_metrics": by_example | measured.items,
            "item_groups": self.groups,
        }

    def with_others(self, other: Scores) -> Scores:
        """The scores of all examples, from those of some and of the others: what was left out is zero."""
        by_example = {name: list(map(add, each, other.by_example[name])) for name, each in self.by_example.items()}
        losses, tokens = (list(map(add, *pair)) for pair in ((self.losses, other.losses), (self.tokens, other.tokens)))
        return Scores(losses, tokens, by_example, self.groups)

    def first(self, count: int) -> Scores:
        """The scores of the first `count` examples."""
        by_example = {name: each[:count] for name, each in self.by_example.items()}
        return Scores(self.losses[:count], self.tokens[:count], by_example)

    @property
    def loss(self) -> float:
        """Token-weighted mean loss, nats per label."""
        return sum(self.losses) / sum(self.tokens)

    @property
    def metrics(self) -> dict[str, float]:
        return {"loss": self.loss} | {name: sum(each) / len(each) for name, each in self.by_example.items()}
