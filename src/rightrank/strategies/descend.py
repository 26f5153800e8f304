"""`descend`: train the top rank once; cut its adapter downward, with a short recovery."""

from __future__ import annotations

import math

from rightrank.decision.judge import walk_down
from rightrank.records import Arm, TrialFinished, TrialOutcome
from rightrank.strategies.bracket import smallest_cut_that_holds, truncations
from rightrank.strategies.climb import Wanted
from rightrank.strategies.protocol import Answer, Cost, History
from rightrank.strategies.rates import find_rate, find_rate_cost, least_trainings
from rightrank.strategies.results import Results, excess_of, within
from rightrank.strategies.script import Scripted

RECOVERY = 0.1  # of a training's steps, on data that the training did not see
RECOVERY_RATE = 0.3  # of the rate that the top was trained at


class Descend(Scripted):
    """Ranks are compared by recovered adapters, the top rank's with the same extra steps among them."""

    name = "descend"

    def script(self, results: Results) -> Wanted:
        space = self.space
        rate = yield from find_rate(space, results, space.top)
        if rate is None:
            return
        cuts = truncations(space, results, space.top, rate)
        yield cuts
        start = smallest_cut_that_holds(space, results, cuts, rate)
        if start is None:
            return
        reference = self._recovered(results, space.top)
        yield [reference]
        rank: int | None = start if start < space.top else space.below(start)
        while rank is not None:
            yield [self._recovered(results, rank)]
            if not self._holds(results, rank):
                break
            rank = space.below(rank)

    def unbounded_cost(self) -> Cost:
        space = self.space
        return Cost(
            find_rate_cost(space) + 3 * RECOVERY,
            len(space.rates) + self._recovery_steps() * len(space.ranks) / space.steps,
        )

    def least_trainings(self) -> float:
        return least_trainings(self.space) - 1 + 2 * RECOVERY

    def most_script_arms(self) -> int:
        return 1 + 3 * len(self.space.rates) + 2 * len(self.space.ranks)

    def evidence(self, history: History) -> list[TrialOutcome]:
        outcomes = self._play(history).results.outcomes
        return [outcome for arm, outcome in outcomes.items() if arm.rank == 0 or (arm.truncate_from and arm.steps)]

    def answer(self, history: History) -> Answer:
        played = self._play(history)
        results, top = played.results, self.space.top
        recovered = {arm.rank for arm in results.outcomes if arm.truncate_from and arm.steps}
        rate = results.best_rate(top)
        chosen = None if rate is None else walk_down(recovered, top, lambda rank: self._holds(results, rank))
        return Answer(chosen, rate, top, played.complete)

    def _recovery_steps(self) -> int:
        return math.ceil(RECOVERY * self.space.steps)

    def _recovered(self, results: Results, rank: int) -> Arm:
        rate = results.best_rate(self.space.top)
        assert rate is not None
        parent = results.direct()[self.space.top, rate, self.space.seeds[0]]
        return self.space.arm(rank, rate * RECOVERY_RATE).model_copy(
            update={"steps": self._recovery_steps(), "truncate_from": parent.trial_id}
        )

    def _holds(self, results: Results, rank: int) -> bool:
        """Against the recovered top: both had the same steps."""
        cut, top = (results.finished(self._recovered(results, r)) for r in (rank, self.space.top))
        if not isinstance(cut, TrialFinished) or not isinstance(top, TrialFinished):
            return False
        return within(excess_of([(cut, top)], self.space).high, self.space.margin_at(abs(top.value)))
