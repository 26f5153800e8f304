"""Held-out scores of a split, one per example, and the metrics that are measured beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import add
from typing import Any

from rightrank.schema.errors import MetricError


@dataclass(frozen=True, slots=True)
class MetricResults:
    """Metrics by name, with the scores of examples whose mean they are, and the reasons why some failed."""

    values: dict[str, float] = field(default_factory=dict)
    example_scores: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def require_values(self, names: Sequence[str]) -> None:
        """Check that these metrics have a value.

        Raises:
            MetricError: one of them failed.
        """
        reason = next((self.failures[name] for name in names if name in self.failures), None)
        if reason is not None:
            raise MetricError(f"{reason}; trained adapters are kept: fix the cause and run the same command again")


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a split, in the split's order."""

    losses: list[float]  # nats, summed over the example's label tokens
    tokens: list[int]  # label tokens of the example; 1 where the loss is one of the whole example
    example_metrics: dict[str, list[float]] = field(default_factory=dict)  # metric → its value for each example
    groups: list[int] | None = None  # which examples belong together; None: each stands for itself

    def to_record_fields(self, metric_results: MetricResults) -> dict[str, Any]:
        """Those of the records that hold scores by example, with the metrics measured beside them."""
        by_example = dict(self.example_metrics)
        accuracy = by_example.pop("accuracy", None)  # classification only, with a field of its own
        return {
            "example_losses": self.losses,
            "example_tokens": self.tokens,
            "example_correct": None if accuracy is None else [round(value) for value in accuracy],
            "example_metrics": by_example | metric_results.example_scores,
            "example_groups": self.groups,
        }

    def merge(self, extra_scores: Scores) -> Scores:
        """The scores of all examples, from those of some and of the others: what was left out is zero."""
        by_example = {name: list(map(add, each, extra_scores.example_metrics[name])) for name, each in self.example_metrics.example_scores()}
        losses, tokens = (list(map(add, *pair)) for pair in ((self.losses, extra_scores.losses), (self.tokens, extra_scores.tokens)))
        return Scores(losses, tokens, by_example, self.groups)

    def take_first(self, count: int) -> Scores:
        """The scores of the first `count` examples."""
        by_example = {name: each[:count] for name, each in self.example_metrics.example_scores()}
        return Scores(self.losses[:count], self.tokens[:count], by_example)

    @property
    def loss(self) -> float:
        """Token-weighted mean loss, nats per label."""
        return sum(self.losses) / sum(self.tokens)

    @property
    def metrics(self) -> dict[str, float]:
        return {"loss": self.loss} | {name: sum(each) / len(each) for name, each in self.example_metrics.example_scores()}
