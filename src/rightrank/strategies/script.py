"""A strategy told as a script: a generator that yields the arms it wants and reads their results.

Each `ask` plays the script from the beginning over the outcomes so far and stops at the first arms without one. The
script sees the outcomes of what it asked for and nothing else, so it is a pure function of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from rightrank.records import Arm, TrialFinished, TrialOutcome
from rightrank.strategies.climb import Wanted, climb
from rightrank.strategies.protocol import Answer, Cost, History, base_arm, seconds_of, steps_of
from rightrank.strategies.results import Results
from rightrank.strategies.space import Space


@dataclass(frozen=True, slots=True)
class _Played:
    """Where a script stands: what it saw, what it waits for, and whether it came to its end."""

    results: Results
    waiting: list[Arm]
    complete: bool


class Scripted(ABC):
    """The part that all scripts share: playing, budgets, the answer."""

    name: str

    def __init__(self, space: Space) -> None:
        self.space = space

    @abstractmethod
    def script(self, results: Results) -> Wanted:
        """The arms wanted, in turn; `results` holds the outcomes of all that was yielded before."""

    @abstractmethod
    def unbounded_cost(self) -> Cost:
        """What the script costs without a budget, in whole trainings."""

    @abstractmethod
    def most_script_arms(self) -> int:
        """The base and every arm that the script could ask for, a sweep left out."""

    def most_arms(self) -> int:
        return self.most_script_arms() + 2 * len(self.space.variants) * len(self.space.rates)

    def least_trainings(self) -> float:
        return float(len(self.space.rates) + 1)

    def expected_arms(self) -> int:
        return min(self.most_arms(), 1 + round(1.6 * self.cost().expected))

    def ask(self, history: History) -> Sequence[Arm]:
        return self._play(history).waiting

    def cost(self) -> Cost:
        cost, budget, space = self.unbounded_cost(), self.space.budget_steps, self.space
        cells = 2 * len(space.variants)  # the chosen rank and the reference
        expected = cost.expected + cells * min(3, len(space.rates))
        most = cost.most + cells * len(space.rates)
        most = most if budget is None else min(most, budget / space.steps)
        return Cost(min(expected, most), most)

    def evidence(self, history: History) -> list[TrialOutcome]:
        outcomes = self._play(history).results.outcomes
        return [outcome for arm, outcome in outcomes.items() if arm.is_direct and self.space.is_plain(arm)]

    def answer(self, history: History) -> Answer:
        played = self._play(history)
        results = played.results
        rank = results.smallest_that_holds()
        rate = None if rank is None else results.best_rate(rank)
        return Answer(rank, rate, results.reference(), played.complete)

    def _play(self, history: History) -> _Played:
        results = Results(self.space)
        spent_steps, spent_seconds = 0, 0.0
        for wanted in self._whole_script(results):
            waiting: list[Arm] = []
            for arm in wanted:
                if arm in results.outcomes:
                    continue
                steps = steps_of(arm, history)
                outcome = history.outcomes.get(arm)
                pace = spent_seconds / spent_steps if spent_steps else 0.0
                spent_steps += steps
                if not self._affordable(spent_steps, spent_seconds + (pace * steps if outcome is None else 0.0)):
                    return _Played(results, waiting, complete=False)
                if outcome is None:
                    waiting.append(arm)
                    continue
                results.add(arm, outcome)
                if isinstance(outcome, TrialFinished):
                    spent_seconds += seconds_of(outcome, history)
            if waiting:
                return _Played(results, waiting, complete=False)
        return _Played(results, [], complete=True)

    def _whole_script(self, results: Results) -> Wanted:
        yield [base_arm(self.space.lora_alpha)]
        yield from self.script(results)
        yield from sweep(self.space, results)

    def _affordable(self, steps: int, seconds: float) -> bool:
        space = self.space
        if space.budget_steps is not None and steps > space.budget_steps:
            return False
        return space.budget_seconds is None or seconds <= space.budget_seconds


def sweep(space: Space, results: Results) -> Wanted:
    """Every variant at the chosen rank and at the reference, its rate climbed from theirs."""
    ranks = {results.smallest_that_holds(), results.reference()} - {None}
    for variant in space.variants:
        for rank in sorted(rank for rank in ranks if rank is not None):
            rate = results.best_rate(rank)
            assert rate is not None
            yield from climb(space, results, rank, rate, variant=variant)
