"""The protocol between a strategy and the loop that runs its arms: ask for arms, receive outcomes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.trials import Arm, TrialFinished, TrialOutcome


@dataclass(frozen=True, slots=True)
class History:
    outcomes: dict[Arm, TrialOutcome]

    @classmethod
    def of(cls, outcomes: Iterable[TrialOutcome]) -> History:
        return cls({outcome.arm: outcome for outcome in outcomes})

    def finished(self) -> list[TrialFinished]:
        return [outcome for outcome in self.outcomes.values() if isinstance(outcome, TrialFinished)]


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """The cost of a strategy in whole trainings: the optimizer steps of all its arms over the steps of one training."""

    expected: float
    maximum: float
    to_adapter: float  # expected, until the first question is answered


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The smallest rank that is within the margin of the reference, by the strategy's own arms."""

    rank: int | None  # None: too few trials have finished
    learning_rate: float | None
    reference_rank: int | None
    complete: bool  # False: arms are still to run, or the budget ended first


class Strategy(Protocol):
    """Decides which arms to train next.

    An implementation keeps these rules. `tests/search/test_conformance.py` checks them for every name in `STRATEGIES`.

    - It is a pure function of the history and keeps no state. The same outcomes, in any order, give the same arms: a run
      resumes from its journal alone, and a table of finished runs replays as real training does.
    - Every arm lies in the space: a rank, a learning rate and a seed of the space, or the truncation of a finished trial.
      The base arm comes first.
    - `ask` returns only arms without an outcome, and no arm twice.
    - `ask` returns an empty sequence in the end, whichever trials fail or diverge. A failed trial is a missing cell and
      no evidence against its rank.
    - Arms and steps stay within `max_arms`, `cost().maximum` and the budget of the space.
    - Outcomes of arms that the strategy did not ask for change nothing.

    Most strategies derive from `Scripted`, which keeps these rules, and write one generator::

        class TopAndBottom(Scripted):
            name = "top-and-bottom"

            def script(self, trials: Trials) -> Requests:
                learning_rate = yield from find_learning_rate(self.space, trials, self.space.top)
                if learning_rate is not None:
                    yield from try_rank(self.space, trials, self.space.ranks[0], learning_rate)
    """

    @property
    def name(self) -> str: ...

    def ask(self, history: History) -> Sequence[Arm]:
        """Return the arms to run now. They may run in any order and at the same time."""
        ...

    def expected_arms(self) -> int:
        """Return about how many arms `ask` will return in all, with the base where the space evaluates it. The progress display uses it."""
        ...

    def max_arms(self) -> int:
        """Return an upper bound of the number of arms, with the base where the space evaluates it."""
        ...

    def cost(self) -> CostEstimate:
        """Return the cost before anything has run, at most the budget of the space."""
        ...

    def min_trainings(self) -> float:
        """Return the smallest budget, in whole trainings, within which the strategy compares two ranks."""
        ...

    def evidence(self, history: History) -> list[TrialOutcome]:
        """Return the outcomes that the decision may compare: trainings of one length at one setting."""
        ...

    def adapter(self, history: History) -> AdapterAnswer | None:
        """Return the answer to the first question; None until all its candidates have run."""
        ...

    def notes(self, history: History) -> Sequence[str]:
        """Return lines for a person about the search so far. Later histories only append; each line is printed once."""
        ...

    def recommend(self, history: History) -> Recommendation:
        """Return the rank that the outcomes support best so far. The decision, which has intervals, may differ."""
        ...


def base_arm(lora_alpha: float) -> Arm:
    """Rank 0: the base without an adapter. It is evaluated once and is a point of every curve."""
    return Arm(rank=0, learning_rate=0.0, lora_alpha=lora_alpha, seed=0, steps=0)


def steps_of(arm: Arm, history: History) -> int:
    """Optimizer steps that `arm` adds. An arm that resumes a stopped one does not pay for its steps again."""
    end = arm.stop_at if arm.stop_at is not None else arm.steps
    if arm.continue_from is None:
        return end
    before = [outcome for outcome in history.outcomes.values() if outcome.trial_id == arm.continue_from]
    return end - (before[0].stop_at or 0) if before else end


def seconds_of(outcome: TrialFinished, history: History) -> float:
    """Seconds of training and evaluation that `outcome` adds to those of the trial that it resumed."""
    seconds = outcome.train_seconds + outcome.eval_seconds
    for before in history.finished():
        if before.trial_id == outcome.continue_from:
            return seconds - before.train_seconds - before.eval_seconds
    return seconds
