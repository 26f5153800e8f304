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
        return cls({outcome.arm: outcome for outcome in outcomes})

    def finished(self) -> list[TrialFinished]:
        return [outcome for outcome in self.outcomes.values() if isinstance(outcome, TrialFinished)]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a strategy asks for, in whole trainings (the steps of all its arms over the steps of one)."""

    expected: float
    most: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What a strategy makes of its own arms: the smallest rank that held, tested from the top down."""

    rank: int | None  # None: too little finished to say
    learning_rate: float | None
    reference_rank: int | None
    complete: bool  # False: the budget ended first, or arms are still to run


class Strategy(Protocol):
    """What decides which arms to train."""

    @property
    def name(self) -> str: ...

    def ask(self, history: History) -> Sequence[Arm]:
        """The arms to run now, those that have ended left out; empty when nothing more is wanted."""
        ...

    def expected_arms(self) -> int:
        """About how many arms it will ask for, the base included; shown as progress."""
        ...

    def most_arms(self) -> int:
        """How many arms it will ask for at most, the base included."""
        ...

    def cost(self) -> Cost:
        """What it will cost, said before the start; never more than the budget."""
        ...

    def least_trainings(self) -> float:
        """The smallest budget in which it can compare two ranks."""
        ...

    def evidence(self, history: History) -> list[TrialOutcome]:
        """The outcomes that ranks may be compared by: like with like."""
        ...

    def answer(self, history: History) -> Answer:
        """The best-supported rank so far, by values (and item losses where there are any)."""
        ...


def base_arm(lora_alpha: float) -> Arm:
    """Rank 0: the base itself, evaluated once and a point of every curve."""
    return Arm(rank=0, learning_rate=0.0, lora_alpha=lora_alpha, seed=0, steps=0)


def steps_of(arm: Arm, history: History) -> int:
    """Optimizer steps that running `arm` takes: what it goes on from was paid for before."""
    end = arm.stop_at if arm.stop_at is not None else arm.steps
    if arm.continue_from is None:
        return end
    before = [outcome for outcome in history.outcomes.values() if outcome.trial_id == arm.continue_from]
    return end - (before[0].stop_at or 0) if before else end


def seconds_of(outcome: TrialFinished, history: History) -> float:
    """Seconds of training and evaluation that an outcome added: what it went on from was counted before."""
    seconds = outcome.train_seconds + outcome.eval_seconds
    for before in history.finished():
        if before.trial_id == outcome.continue_from:
            return seconds - before.train_seconds - before.eval_seconds
    return seconds
