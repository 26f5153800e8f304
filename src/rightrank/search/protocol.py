"""The interface of a strategy: a script, a generator that yields the arms it needs and reads their outcomes.

Each `ask` replays the script from the beginning over the outcomes so far and stops at the first arms without one. The
script sees the outcomes of its own arms and nothing else, so that it is a pure function of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from rightrank.schema.trials import Arm, TrialFinished, TrialOutcome, compute_added_seconds, count_added_steps
from rightrank.search.history import Requests, Space, Trials, make_base_arm


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """The cost of a strategy in full trainings: the optimizer steps of all its arms over the steps of one training."""

    expected: float
    maximum: float
    expected_until_adapter: float  # expected cost until the deployment rank is found
    minimum: (
        float  # the smallest budget within which the strategy can answer: it finishes an adapter, or compares two ranks
    )
    max_arms: int  # an upper bound of the number of arms, including the base


class Strategy(ABC):
    """Decides which arms to train next, within the budget.

    A subclass defines `name` and `script`. These rules hold for every name in `STRATEGIES` (`tests/search/test_conformance.py`):

    - It is a pure function of the history and keeps no state. The same outcomes, in any order, give the same arms: a run
      resumes from its journal alone, and a table of finished runs replays as real training does.
    - Every arm lies in the space: a rank, a learning rate and a seed of the space, or the truncation of a finished trial.
      The base arm comes first.
    - `ask` returns only arms without an outcome, and no arm twice.
    - `ask` eventually returns an empty sequence, whichever trials fail or diverge. A failed trial is a missing cell and
      no evidence against its rank.
    - Arms and steps stay within `estimate_cost().max_arms`, `estimate_cost().maximum` and the budget of the space.
    - Outcomes of arms that the strategy did not request change nothing.

    `estimate_unbounded_cost` holds for every script that trains a cell of the rank × learning rate × seed grid at most once, in up to
    three stages; a subclass defines tighter or other bounds.

    For example::

        class TopAndBottom(Strategy):
            name = "top-and-bottom"

            def script(self, trials: Trials) -> Requests:
                learning_rate = yield from find_learning_rate(trials, self.space.top)
                if learning_rate is not None:
                    yield from try_rank(trials, self.space.ranks[0], learning_rate)
    """

    name: str

    def __init__(self, space: Space) -> None:
        self.space = space

    @abstractmethod
    def script(self, trials: Trials) -> Requests:
        """Yield the arms to run, in turn. After a `yield`, `trials` holds the outcomes of all arms yielded so far."""

    def estimate_unbounded_cost(self) -> CostEstimate:
        """Estimate the cost without a budget."""
        cells = self._count_cells()
        return CostEstimate(cells, cells, cells, len(self.space.learning_rates) + 1.0, 1 + 3 * cells)

    def _count_cells(self) -> int:
        """Return the number of cells of the rank × learning rate × seed grid."""
        return math.prod(map(len, (self.space.ranks, self.space.learning_rates, self.space.seeds)))

    def estimate_arms(self) -> int:
        """Estimate how many arms `ask` will return in total, for the progress display."""
        cost = self.estimate_cost()
        return min(cost.max_arms, int(self.space.evaluates_base) + round(1.6 * cost.expected))

    def estimate_cost(self) -> CostEstimate:
        """Estimate the cost before anything has run, at most the budget of the space, including the base if the space evaluates it."""
        cost, budget, space = self.estimate_unbounded_cost(), self.space.budget_steps, self.space
        maximum = cost.maximum if budget is None else min(cost.maximum, budget / space.steps)
        arms = cost.max_arms - 1 + int(space.evaluates_base)
        expected, to_adapter = min(cost.expected, maximum), min(cost.expected_until_adapter, maximum)
        return CostEstimate(expected, maximum, to_adapter, cost.minimum, arms)

    def ask(self, outcomes: Iterable[TrialOutcome]) -> Sequence[Arm]:
        """Return the arms to run now. They may run in any order and at the same time."""
        return self.replay_trials(outcomes).waiting

    def replay_trials(self, outcomes: Iterable[TrialOutcome]) -> Trials:
        """Replay the script. Return the outcomes that it has seen, the arms that it waits for, the deployment rank and its notes."""
        trials, outcomes_by_arm = Trials(self.space), {outcome.arm: outcome for outcome in outcomes}
        finished = {
            outcome.trial_id: outcome for outcome in outcomes_by_arm.values() if isinstance(outcome, TrialFinished)
        }
        limits = self.space.budget_steps, self.space.budget_seconds
        most_steps, most_seconds = (math.inf if limit is None else limit for limit in limits)
        base = [[make_base_arm(self.space.lora_alpha)]] if self.space.evaluates_base else []
        for requested_arms in chain(base, self.script(trials)):
            for arm in requested_arms:
                if arm in trials.outcomes:
                    continue
                steps = count_added_steps(arm, finished)
                outcome = outcomes_by_arm.get(arm)
                pace = trials.spent_seconds / trials.spent_steps if trials.spent_steps else 0.0
                trials.spent_steps += steps
                seconds = trials.spent_seconds + (pace * steps if outcome is None else 0.0)
                # The evaluation of a truncation is short, and without it a training hands over no smaller adapter.
                if steps and (trials.spent_steps > most_steps or seconds > most_seconds):
                    if not trials.waiting:
                        trials.notes.append(
                            f"The budget ends before {arm.format_label()} ({steps} steps); with a larger one, the same command continues."
                        )
                    return trials
                if outcome is None:
                    trials.waiting.append(arm)
                    continue
                trials.outcomes[arm] = outcome
                if isinstance(outcome, TrialFinished):
                    trials.spent_seconds += compute_added_seconds(outcome, finished)
            if trials.waiting:
                break
        return trials
