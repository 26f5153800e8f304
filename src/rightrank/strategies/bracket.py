"""`bracket`: the truncations of the top rank's adapter show where to look, and trainings show what is right."""

from __future__ import annotations

from rightrank.decision.judge import walk_down
from rightrank.records import Arm
from rightrank.strategies.climb import Requests
from rightrank.strategies.ladder import predicted_rank
from rightrank.strategies.moves import try_rank, walk
from rightrank.strategies.search import Search
from rightrank.strategies.space import Space
from rightrank.strategies.trials import Trials, excess_of, is_within


class Bracket(Search):
    """Find the learning rate at the top rank, evaluate the truncations of that adapter to every lower rank, then train downward
    from the smallest truncation that loses at most the margin until a rank fails.

    Where adapters can't be truncated (a table of finished runs), a training at a quarter of the top rank replaces them.
    """

    name = "bracket"

    def first_rank(self) -> int:
        return self.space.top

    def explore(self, trials: Trials, learning_rate: float) -> Requests:
        space = self.space
        truncated = truncations(space, trials, space.top, learning_rate)
        yield truncated
        start = smallest_truncation_that_holds(space, trials, truncated, learning_rate)
        if start is None:
            second = space.a_quarter_of_the_top()
            yield from try_rank(space, trials, second, learning_rate)
            start = predicted_rank(space, trials, second)
        elif start == space.top:
            start = space.below(start) or start
        yield from walk(space, trials, start, learning_rate)

    def exploration_cost(self) -> float:
        return min(2.0, len(self.space.ranks) - 1.0)

    def max_script_arms(self) -> int:
        return super().max_script_arms() + len(self.space.ranks) - 1


def truncations(space: Space, trials: Trials, rank: int, learning_rate: float) -> list[Arm]:
    """The adapter of a finished training truncated to every lower rank, without recovery, descending."""
    parent = trials.direct().get((rank, learning_rate, space.seeds[0]))
    if parent is None or not space.stages:
        return []
    return [
        space.arm(lower, learning_rate).model_copy(update={"steps": 0, "truncate_from": parent.trial_id})
        for lower in reversed(space.ranks)
        if lower < rank
    ]


def smallest_truncation_that_holds(
    space: Space, trials: Trials, truncated: list[Arm], learning_rate: float
) -> int | None:
    """The result of the walk down over the truncations of the top rank; None where none has a result."""
    parent = trials.direct().get((space.top, learning_rate, space.seeds[0]))
    known = {arm.rank: outcome for arm in truncated if (outcome := trials.finished(arm)) is not None}
    if parent is None or not known:
        return None
    margin = space.margin_at(trials.best_loss(space.top))
    return walk_down(known, space.top, lambda rank: is_within(excess_of([(known[rank], parent)], space).mean, margin))
