"""A strategy as a script: a generator that yields the arms it wants and reads their outcomes.

Each `ask` replays the script from the beginning over the outcomes so far and stops at the first arms without one. The
script sees the outcomes of its own arms and nothing else, so that it is a pure function of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.trials import Arm, TrialFinished, TrialOutcome
from rightrank.search.history import Trials
from rightrank.search.learning_rates import Requests, climb
from rightrank.search.protocol import CostEstimate, History, Recommendation, base_arm, seconds_of, steps_of
from rightrank.search.space import Space


@dataclass(frozen=True, slots=True)
class _Replay:
    """The point that a script reached: its trials, the arms it waits for, and whether it ended."""

    trials: Trials
    waiting: list[Arm]
    complete: bool


class Scripted(ABC):
    """A strategy that is written as a script. It replays the script, keeps to the budget and adds the sweep.

    A subclass defines `name` and `script`. The bounds below hold for every script that trains a cell of the rank × learning
    rate × seed grid at most once, in up to three stages; a subclass states tighter or other bounds.
    """

    name: str

    def __init__(self, space: Space) -> None:
        self.space = space

    @abstractmethod
    def script(self, trials: Trials) -> Requests:
        """Yield the arms to run, in turn. After a `yield`, `trials` holds the outcomes of all arms yielded so far."""

    def unbounded_cost(self) -> CostEstimate:
        """The cost without a budget and without a sweep."""
        return CostEstimate(self._cells(), self._cells(), self._cells())

    def max_script_arms(self) -> int:
        """An upper bound of the number of arms without a sweep, the base included."""
        return 1 + 3 * self._cells()

    def min_trainings(self) -> float:
        return float(len(self.space.learning_rates) + 1)

    def _cells(self) -> int:
        return math.prod(map(len, (self.space.ranks, self.space.learning_rates, self.space.seeds)))

    def max_arms(self) -> int:
        base = int(self.space.evaluates_base)
        return self.max_script_arms() - 1 + base + 2 * len(self.space.variants) * len(self.space.learning_rates)

    def expected_arms(self) -> int:
        return min(self.max_arms(), int(self.space.evaluates_base) + round(1.6 * self.cost().expected))

    def ask(self, history: History) -> Sequence[Arm]:
        return self._replay(history).waiting

    def cost(self) -> CostEstimate:
        cost, budget, space = self.unbounded_cost(), self.space.budget_steps, self.space
        climbs = 2 * len(space.variants)  # at the chosen rank and at the reference
        expected = cost.expected + climbs * min(3, len(space.learning_rates))
        maximum = cost.maximum + climbs * len(space.learning_rates)
        maximum = maximum if budget is None else min(maximum, budget / space.steps)
        return CostEstimate(min(expected, maximum), maximum, min(cost.to_adapter, maximum))

    def evidence(self, history: History) -> list[TrialOutcome]:
        outcomes = self._replay(history).trials.outcomes
        return [outcome for arm, outcome in outcomes.items() if arm.is_direct and self.space.is_plain(arm)]

    def adapter(self, history: History) -> AdapterAnswer | None:
        return self._replay(history).trials.adapter

    def notes(self, history: History) -> Sequence[str]:
        return self._replay(history).trials.notes

    def recommend(self, history: History) -> Recommendation:
        replay = self._replay(history)
        rank = replay.trials.smallest_that_holds()
        learning_rate = None if rank is None else replay.trials.best_learning_rate(rank)
        return Recommendation(rank, learning_rate, replay.trials.reference(), replay.complete)

    def _replay(self, history: History) -> _Replay:
        trials = Trials(self.space)
        spent_steps, spent_seconds = 0, 0.0
        for wanted in self._whole_script(trials):
            waiting: list[Arm] = []
            for arm in wanted:
                if arm in trials.outcomes:
                    continue
                steps = steps_of(arm, history)
                outcome = history.outcomes.get(arm)
                pace = spent_seconds / spent_steps if spent_steps else 0.0
                spent_steps += steps
                if not self._is_affordable(spent_steps, spent_seconds + (pace * steps if outcome is None else 0.0)):
                    return _Replay(trials, waiting, complete=False)
                if outcome is None:
                    waiting.append(arm)
                    continue
                trials.add(arm, outcome)
                if isinstance(outcome, TrialFinished):
                    spent_seconds += seconds_of(outcome, history)
            if waiting:
                return _Replay(trials, waiting, complete=False)
        return _Replay(trials, [], complete=True)

    def _whole_script(self, trials: Trials) -> Requests:
        if self.space.evaluates_base:
            yield [base_arm(self.space.lora_alpha)]
        yield from self.script(trials)
        yield from _sweep(self.space, trials)

    def _is_affordable(self, steps: int, seconds: float) -> bool:
        space = self.space
        if space.budget_steps is not None and steps > space.budget_steps:
            return False
        return space.budget_seconds is None or seconds <= space.budget_seconds


def _sweep(space: Space, trials: Trials) -> Requests:
    """Climb with every variant at the chosen rank and at the reference, from the best learning rate of each."""
    ranks = {trials.smallest_that_holds(), trials.reference()} - {None}
    for variant in space.variants:
        for rank in sorted(rank for rank in ranks if rank is not None):
            learning_rate = trials.best_learning_rate(rank)
            assert learning_rate is not None
            yield from climb(space, trials, rank, learning_rate, variant)
