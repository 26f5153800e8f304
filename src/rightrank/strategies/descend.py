"""`descend`: train the top rank once and truncate its adapter downward, with a short recovery."""

from __future__ import annotations

import math

from rightrank.decision.judge import walk_down
from rightrank.records import Arm, TrialFinished, TrialOutcome
from rightrank.strategies.bracket import smallest_truncation_that_holds, truncations
from rightrank.strategies.climb import Requests
from rightrank.strategies.learning_rates import find_learning_rate, find_learning_rate_cost, min_trainings
from rightrank.strategies.protocol import CostEstimate, History, Recommendation
from rightrank.strategies.script import Scripted
from rightrank.strategies.trials import Trials, excess_of, is_within

RECOVERY = 0.1  # of a training's steps, on data that the training did not see
RECOVERY_LEARNING_RATE = 0.3  # of the learning rate that the top rank was trained at


class Descend(Scripted):
    """Compare recovered adapters. The top rank's adapter gets the same recovery steps as its truncations."""

    name = "descend"

    def script(self, trials: Trials) -> Requests:
        space = self.space
        learning_rate = yield from find_learning_rate(space, trials, space.top)
        if learning_rate is None:
            return
        truncated = truncations(space, trials, space.top, learning_rate)
        yield truncated
        start = smallest_truncation_that_holds(space, trials, truncated, learning_rate)
        if start is None:
            return
        yield [self._recovered(trials, space.top)]
        rank: int | None = start if start < space.top else space.below(start)
        while rank is not None:
            yield [self._recovered(trials, rank)]
            if not self._holds(trials, rank):
                break
            rank = space.below(rank)

    def unbounded_cost(self) -> CostEstimate:
        space = self.space
        return CostEstimate(
            find_learning_rate_cost(space) + 3 * RECOVERY,
            len(space.learning_rates) + self._recovery_steps() * len(space.ranks) / space.steps,
        )

    def min_trainings(self) -> float:
        return min_trainings(self.space) - 1 + 2 * RECOVERY

    def max_script_arms(self) -> int:
        return 1 + 3 * len(self.space.learning_rates) + 2 * len(self.space.ranks)

    def evidence(self, history: History) -> list[TrialOutcome]:
        outcomes = self._replay(history).trials.outcomes
        return [outcome for arm, outcome in outcomes.items() if arm.rank == 0 or (arm.truncate_from and arm.steps)]

    def recommend(self, history: History) -> Recommendation:
        replay, top = self._replay(history), self.space.top
        trials = replay.trials
        recovered = {arm.rank for arm in trials.outcomes if arm.truncate_from and arm.steps}
        learning_rate = trials.best_learning_rate(top)
        chosen = None if learning_rate is None else walk_down(recovered, top, lambda rank: self._holds(trials, rank))
        return Recommendation(chosen, learning_rate, top, replay.complete)

    def _recovery_steps(self) -> int:
        return math.ceil(RECOVERY * self.space.steps)

    def _recovered(self, trials: Trials, rank: int) -> Arm:
        learning_rate = trials.best_learning_rate(self.space.top)
        assert learning_rate is not None
        parent = trials.direct()[self.space.top, learning_rate, self.space.seeds[0]]
        return self.space.arm(rank, learning_rate * RECOVERY_LEARNING_RATE).model_copy(
            update={"steps": self._recovery_steps(), "truncate_from": parent.trial_id}
        )

    def _holds(self, trials: Trials, rank: int) -> bool:
        """Whether the upper bound of the excess over the recovered top is within the margin."""
        ours, top = (trials.finished(self._recovered(trials, r)) for r in (rank, self.space.top))
        if not isinstance(ours, TrialFinished) or not isinstance(top, TrialFinished):
            return False
        return is_within(excess_of([(ours, top)], self.space).high, self.space.margin_at(abs(top.value)))
