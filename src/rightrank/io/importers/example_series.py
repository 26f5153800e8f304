"""Scores per example in trackers: `rightrank` logs them as series `items/NAME` whose step is the example's number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Steps: TypeAlias = Mapping[int, Mapping[str, Any]]

PREFIX = "items/"
WEIGHTS = "tokens"


@dataclass(frozen=True, slots=True)
class ExampleScores:
    """The scores of one example in one training."""

    number: str
    weight: Any
    values: Mapping[str, Any]  # by metric, named as for the whole training

    @property
    def place(self) -> dict[str, Any]:
        return {"item": self.number, "tokens": self.weight}


def split_examples(steps: Steps) -> tuple[dict[int, dict[str, Any]], list[ExampleScores]]:
    """Separate the series of examples: `(other numbers by step, scores by example)`."""
    others: dict[int, dict[str, Any]] = {}
    examples: list[ExampleScores] = []
    for step, values in sorted(steps.items()):
        plain = {name: value for name, value in values.items() if not name.startswith(PREFIX)}
        scores = {name.removeprefix(PREFIX): value for name, value in values.items() if name.startswith(PREFIX)}
        if plain:
            others[step] = plain
        if scores:
            weight = scores.pop(WEIGHTS, 1.0)
            examples.append(
                ExampleScores(f"{step:06d}", weight, {f"eval/{name}": value for name, value in scores.items()})
            )
    return others, examples
