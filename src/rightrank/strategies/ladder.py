"""`ladder`: the learning rate at the top rank, then ranks downward from where a power law predicts the answer."""

from __future__ import annotations

import math

from rightrank.strategies.climb import Requests
from rightrank.strategies.moves import try_rank, walk
from rightrank.strategies.search import Search
from rightrank.strategies.space import Space
from rightrank.strategies.trials import Trials

DECAY = 0.57  # median exponent c of L(r) = a + b·r^-c over 26 published curves (quartiles 0.38 to 0.64)


class Ladder(Search):
    """Train the top rank and a quarter of it, and walk from the rank that the power law through both predicts."""

    name = "ladder"

    def first_rank(self) -> int:
        return self.space.top

    def explore(self, trials: Trials, learning_rate: float) -> Requests:
        second = self.space.a_quarter_of_the_top()
        yield from try_rank(self.space, trials, second, learning_rate)
        yield from walk(self.space, trials, predicted_rank(self.space, trials, second), learning_rate)

    def exploration_cost(self) -> float:
        return min(2.5, len(self.space.ranks) - 1.0)


def predicted_rank(space: Space, trials: Trials, second: int) -> int:
    """The smallest rank r with b·(r^-c - R^-c) within the margin; R is the top rank, and b follows from R and `second`."""
    drop = trials.best_loss(second) - trials.best_loss(space.top)
    b = max(drop, 0.0) / (second**-DECAY - space.top**-DECAY)
    margin = space.margin_at(trials.best_loss(space.top))
    if not math.isfinite(b):  # the second rank gave no result
        return space.above(second) or space.top
    return next(rank for rank in space.ranks if b * (rank**-DECAY - space.top**-DECAY) <= margin)
