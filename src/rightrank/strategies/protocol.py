"""The protocol between a strategy and whatever runs its arms: ask for arms, receive outcomes.

A strategy keeps no state. Given the same outcomes, in whatever order they came, it asks for the same arms; so a
selection resumes from its journal alone, and replays on a table of finished runs as on real training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rightrank.records import Arm, TrialFinished, TrialOutcome


@dataclass(frozen=True, slots=True)
class History:
    """The outcomes so far, looked up by arm."""

    outcomes: dict[Arm, TrialOutcome]

    @classmethod
    def of(cls, outcomes: Iterable[TrialOutcome]) -> History:
        return cls({arm_of(outcome): outcome for outcome in outcomes})

    def has_ended(self, arm: Arm) -> bool:
        """Whether the arm has ended, well or not: an arm is never asked for twice."""
        return arm in self.outcomes

    def finished(self) -> list[TrialFinished]:
        return [outcome for outcome in self.outcomes.values() if isinstance(outcome, TrialFinished)]


class Strategy(Protocol):
    """What decides which arms to train."""

    @property
    def name(self) -> str: ...

    def ask(self, history: History) -> Sequence[Arm]:
        """The arms to run now, those that have ended left out; empty when nothing more is wanted."""
        ...

    def most_arms(self) -> int:
        """How many arms it will ask for at most, the base included."""
        ...


def arm_of(outcome: TrialOutcome) -> Arm:
    """The arm that an outcome is of."""
    return Arm(
        rank=outcome.rank,
        learning_rate=outcome.learning_rate,
        lora_alpha=outcome.lora_alpha,
        seed=outcome.seed,
        steps=outcome.steps,
    )


def base_arm(lora_alpha: float) -> Arm:
    """Rank 0: the base itself, evaluated once and a point of every curve."""
    return Arm(rank=0, learning_rate=0.0, lora_alpha=lora_alpha, seed=0, steps=0)
