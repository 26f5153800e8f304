"""`bracket`: the adapter first, from one training at the top rank; then the rank to train at, from there downward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

from rightrank.decision.comparison import is_within, walk_down
from rightrank.schema.trials import Arm
from rightrank.search.adapter import adapter_question_cost, answer_adapter_question, max_adapter_arms, max_adapter_cost
from rightrank.search.history import Trials, excess_of
from rightrank.search.learning_rates import (
    Requests,
    find_learning_rate,
    find_learning_rate_cost,
    max_search_trainings,
    min_trainings,
)
from rightrank.search.moves import confirm, confirmation_cost, max_trainings, settle, support, try_rank, walk
from rightrank.search.protocol import CostEstimate, Strategy

DECAY = 0.57  # median exponent c of L(r) = a + b·r^-c over 26 published curves (quartiles 0.38 to 0.64)
STAGES = 5  # of one training at most: a look, two stages, the end, and an annealed copy


class Bracket(Strategy):
    """Find the learning rate at the top rank and answer the first question from that training. For the second question, train
    downward from the smallest truncation that loses at most the margin until a rank fails, then add seeds.

    Where adapters can't be truncated (a table of finished runs), a training at a quarter of the top rank shows where to start.
    """

    name = "bracket"

    def script(self, trials: Trials) -> Requests:
        space = self.space
        learning_rate = yield from find_learning_rate(trials, space.top)
        if learning_rate is None:
            return
        yield from answer_adapter_question(trials, learning_rate)
        if space.goal == "adapter":
            return
        start = _smallest_truncation_that_holds(trials, learning_rate)
        if start is None:
            second = space.a_quarter_of_the_top()
            yield from try_rank(trials, second, learning_rate)
            start = _predicted_rank(trials, second)
        elif start == space.top:
            start = space.below(start) or start
        yield from walk(trials, start, learning_rate)
        yield from settle(trials)
        yield from support(trials)
        yield from confirm(trials)
        yield from settle(trials)
        yield from confirm(trials)

    def unbounded_cost(self) -> CostEstimate:
        space = self.space
        to_adapter = find_learning_rate_cost(space) + adapter_question_cost(space)
        if space.goal == "adapter":
            return CostEstimate(to_adapter, max_search_trainings(space) + max_adapter_cost(space), to_adapter)
        expected = to_adapter + min(2.0, len(space.ranks) - 1.0) + confirmation_cost(space)
        return CostEstimate(expected, max_trainings(space) + max_adapter_cost(space), to_adapter)

    def min_trainings(self) -> float:
        found = min_trainings(self.space)
        return found - 1.0 if self.space.goal == "adapter" else found

    def max_script_arms(self) -> int:
        return 1 + STAGES * math.ceil(max_trainings(self.space)) + max_adapter_arms(self.space)


def _smallest_truncation_that_holds(trials: Trials, learning_rate: float) -> int | None:
    """The result of the walk down over the plain truncations of the top rank; None where none has a result."""
    space = trials.space
    parent = trials.direct().get((space.top, learning_rate, space.seeds[0]))
    if parent is None:
        return None
    known = {
        arm.rank: outcome
        for arm in trials.outcomes
        if arm.truncate_from == parent.trial_id and arm.steps == 0 and arm.rank in space.ranks
        if (outcome := trials.finished(arm)) is not None
    }
    if not known:
        return None
    margin = space.margin_at(trials.best_loss(space.top))
    return walk_down(known, space.top, lambda rank: is_within(excess_of([(known[rank], parent)], space).mean, margin))


def _predicted_rank(trials: Trials, second: int) -> int:
    """The smallest rank r with b·(r^-c - R^-c) within the margin; R is the top rank, and b follows from R and `second`."""
    space = trials.space
    drop = trials.best_loss(second) - trials.best_loss(space.top)
    b = max(drop, 0.0) / (second**-DECAY - space.top**-DECAY)
    margin = space.margin_at(trials.best_loss(space.top))
    if not math.isfinite(b):  # the second rank gave no result
        return space.above(second) or space.top
    return next(rank for rank in space.ranks if is_within(b * (rank**-DECAY - space.top**-DECAY), margin))


class Grid(Strategy):
    """The exhaustive grid: seed by seed, from the extreme ranks inward, so that both ends of the curve are known early.

    The first question is answered from the top rank at its best learning rate, once the grid is complete.
    """

    name = "grid"

    def script(self, trials: Trials) -> Requests:
        yield self._arms()
        top = self.space.top
        learning_rate = min(self.space.learning_rates, key=lambda lr: (trials.whole_loss(top, lr), lr))
        yield from answer_adapter_question(trials, learning_rate)

    def unbounded_cost(self) -> CostEstimate:
        maximum = self._cells() + max_adapter_cost(self.space)
        return CostEstimate(maximum, maximum, maximum)

    def max_script_arms(self) -> int:
        return 1 + len(self._arms()) + max_adapter_arms(self.space)

    def min_trainings(self) -> float:
        return 2.0

    def _arms(self) -> list[Arm]:
        space = self.space
        cells = product(space.seeds, space.learning_rates, outside_in(space.ranks))
        return [space.arm(rank, learning_rate, seed) for seed, learning_rate, rank in cells]


def outside_in(ranks: Sequence[int]) -> list[int]:
    """Highest, lowest, second highest, second lowest, …"""
    left = sorted(ranks)
    order: list[int] = []
    while left:
        order.append(left.pop(-1 if len(order) % 2 == 0 else 0))
    return order
