"""The scores of a split's examples, and the metrics that are measured with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import add
from typing import Any

from rightrank.decision.adapter import Criterion, ScoredAdapter
from rightrank.schema.errors import MetricError
from rightrank.schema.results import AdapterMethod


@dataclass(frozen=True, slots=True)
class MetricResults:
    """Values of metrics by name, the example scores of which they are the means, and the reasons why metrics failed."""

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
            raise MetricError(f"{reason}; the trained adapters are saved: fix the cause and run the same command again")


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a split's examples, in the order of the split."""

    losses: list[float]  # nats, summed over the example's label tokens
    tokens: list[int]  # label tokens of the example; 1 if the loss is one of the complete example
    example_metrics: dict[str, list[float]] = field(default_factory=dict)  # metric → its value for each example
    groups: list[int] | None = None  # the group of each example; None: no groups

    @classmethod
    def make_empty(cls, count: int, metrics: Sequence[str], groups: list[int] | None) -> Scores:
        """Return zeros for `count` examples, to be filled in."""
        return cls([0.0] * count, [0] * count, {name: [0.0] * count for name in metrics}, groups)

    def to_record_fields(self, metric_results: MetricResults) -> dict[str, Any]:
        """Return the fields of a trial record that contain scores by example, including those of `metric_results`."""
        by_example = dict(self.example_metrics)
        accuracy = by_example.pop("accuracy", None)  # accuracy exists for classification only and has its own field
        return {
            "example_losses": self.losses,
            "example_tokens": self.tokens,
            "example_correct": None if accuracy is None else [round(value) for value in accuracy],
            "example_metrics": by_example | metric_results.example_scores,
            "example_groups": self.groups,
        }

    def build_scored_adapter(
        self, name: str, rank: int, criterion: Criterion, *, method: AdapterMethod = "truncated"
    ) -> ScoredAdapter:
        metric = criterion.metric
        scores = self.losses if metric == "loss" else self.example_metrics[metric]
        weights = self.tokens if metric == "loss" else [1] * len(scores)
        return ScoredAdapter.from_scores(
            name, rank, self.metrics[metric], (scores, weights), criterion, method=method, groups=self.groups
        )

    def merge(self, extra_scores: Scores) -> Scores:
        """Merge the scores of two disjoint sets of examples. Examples without a score have zeros."""
        by_example = {
            name: list(map(add, each, extra_scores.example_metrics[name]))
            for name, each in self.example_metrics.items()
        }
        losses, tokens = (
            list(map(add, *pair)) for pair in ((self.losses, extra_scores.losses), (self.tokens, extra_scores.tokens))
        )
        return Scores(losses, tokens, by_example, self.groups)

    def take_first(self, count: int) -> Scores:
        by_example = {name: each[:count] for name, each in self.example_metrics.items()}
        groups = None if self.groups is None else self.groups[:count]
        return Scores(self.losses[:count], self.tokens[:count], by_example, groups)

    @property
    def loss(self) -> float:
        """Return the token-weighted mean loss in nats per label."""
        return sum(self.losses) / sum(self.tokens)

    @property
    def metrics(self) -> dict[str, float]:
        return {"loss": self.loss} | {name: sum(each) / len(each) for name, each in self.example_metrics.items()}
