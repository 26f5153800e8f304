"""Simulated worlds that answer arms immediately: a law of ranks, a valley of learning rates, and faults."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from rightrank.decision.adapter import Criterion
from rightrank.schema.trials import (
    Arm,
    EvalPoint,
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialOutcome,
    compute_trial_id,
)
from rightrank.search.protocol import Space, Strategy, Trials
from rightrank.search.strategies import Upward

STEPS = 100
EXACT = Criterion("loss", False, 0.01, "loss", trusts_values=True)


def make_space(**changes: object) -> Space:
    values: dict[str, object] = {
        "ranks": (1, 4, 16, 64),
        "learning_rates": (1e-4, 3e-4, 1e-3, 3e-3),
        "seeds": (0,),
        "lora_alpha": 32.0,
        "steps": STEPS,
        "criterion": Criterion("loss", False, 0.01, "loss"),
    }
    return Space(**(values | changes))  # type: ignore[arg-type]


@dataclass
class World:
    """A world with the loss 1 + gain·r^-0.57 + curvature·(log3 lr/best)², and a little noise for each seed."""

    gain: float = 0.1
    best_learning_rate: float = 1e-3
    noise: float = 0.0
    can_stop_early: bool = True
    can_truncate: bool = True
    breaks: Callable[[Arm], bool] = lambda _: False
    diverges: Callable[[Arm], bool] = lambda _: False
    arms: dict[str, Arm] = field(default_factory=dict)

    def loss(self, arm: Arm) -> float:
        if arm.rank == 0:
            return 1.5 + 2 * self.gain
        off = math.log(arm.learning_rate / self.best_learning_rate) / math.log(3)
        value = 1.0 + self.gain * arm.rank**-0.57 + 0.02 * off**2
        if arm.stop_at is not None:
            value += 0.3 * (1 - arm.stop_at / arm.steps)
        if arm.truncate_from is not None:
            value = 1.0 + self.gain * arm.rank**-0.57 * (1.3 if arm.steps == 0 else 1.05)
        return value + self.noise * (_uniform(arm) - 0.5)

    def run(self, arm: Arm) -> TrialOutcome:
        identity = compute_trial_id("world", arm)
        self.arms[identity] = arm
        if self.breaks(arm) or self._cannot(arm):
            return TrialFailed(trial_id=identity, **arm.model_dump(), error="error", reason="broken")
        if self.diverges(arm):
            return TrialDiverged(trial_id=identity, **arm.model_dump(), step=1, reason="diverged")
        end = arm.steps if arm.stop_at is None else arm.stop_at
        marks = [step for step in (25, 50, 75, 100) if arm.is_direct and arm.rank > 0 and step <= end]
        points = [
            EvalPoint(step=step, value=self.loss(arm.model_copy(update={"stop_at": step})), train_value=None)
            for step in marks
        ]
        return TrialFinished(
            trial_id=identity,
            **arm.model_dump(),
            value=self.loss(arm),
            metrics={"loss": self.loss(arm)},
            points=points,
            trainable_parameters=arm.rank,
            train_seconds=float(end),
        )

    def _cannot(self, arm: Arm) -> bool:
        staged = arm.stop_at is not None or arm.continue_from is not None
        return (staged and not self.can_stop_early) or (arm.truncate_from is not None and not self.can_truncate)


def _uniform(arm: Arm) -> float:
    text = f"{arm.rank} {arm.learning_rate} {arm.seed} {arm.stop_at} {arm.steps}"
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


Order = Callable[[list[Arm]], list[Arm]]


def run_rounds(strategy: Strategy, world: World, outcomes: list[TrialOutcome], order: Order) -> Iterator[Arm]:
    """Run to the end and append outcomes to the list. `order` picks the requested arms that run before the next request."""
    for _ in range(2000):
        arms = list(strategy.replay_trials(outcomes).waiting)
        if not arms:
            return
        for arm in order(arms):
            outcomes.append(world.run(arm))
            yield arm
    pytest.fail(f"{strategy.name} does not end")


def run_all(strategy: Strategy, world: World, order: Order = list) -> list[TrialOutcome]:
    outcomes: list[TrialOutcome] = []
    for _ in run_rounds(strategy, world, outcomes, order):
        pass
    return outcomes


@dataclass(frozen=True)
class Recommendation:
    """The smallest rank that is within the margin of the reference, by a strategy's own arms and without intervals."""

    rank: int | None  # None: too few trials have finished
    learning_rate: float | None
    reference_rank: int | None


def recommend(strategy: Strategy, outcomes: Sequence[TrialOutcome]) -> Recommendation:
    """Return the rank that the outcomes support best. The decision, which has intervals, may differ."""
    trials = strategy.replay_trials(outcomes)
    rank = _smallest_unbeaten(strategy, trials) if isinstance(strategy, Upward) else trials.find_smallest_rank()
    learning_rate = None if rank is None else trials.find_best_learning_rate(rank)
    return Recommendation(rank, learning_rate, trials.find_reference())


def _smallest_unbeaten(strategy: Upward, trials: Trials) -> int | None:
    """Return the smallest rank that no higher rank is shown to beat by more than the margin."""
    chosen: int | None = None
    for rank in sorted(trials.list_ranks()):
        if chosen is None or strategy.has_gain(trials, rank, [chosen]):
            chosen = rank
    return chosen
