"""`ladder`: the rate at the top rank, then ranks downward from where the law of diminishing returns says to look."""

from __future__ import annotations

from rightrank.strategies.climb import Wanted
from rightrank.strategies.moves import (
    confirm,
    confirmation_cost,
    find_rate,
    find_rate_cost,
    least_trainings,
    most_stages,
    most_trainings,
    support,
    try_rank,
    walk,
)
from rightrank.strategies.protocol import Cost
from rightrank.strategies.results import Results
from rightrank.strategies.script import Scripted
from rightrank.strategies.space import Space

DECAY = 0.57  # median exponent c of L(r) = a + b·r^-c over 26 published curves (quartiles 0.38 to 0.64)


class Ladder(Scripted):
    """The top rank at its best rate; one rank a quarter of it; the law through both names where to walk from."""

    name = "ladder"

    def script(self, results: Results) -> Wanted:
        space = self.space
        yield from find_rate(space, results, space.top)
        rate = results.best_rate(space.top)
        second = max((rank for rank in space.ranks if rank <= space.top / 4), default=space.ranks[0])
        if rate is None:
            return
        yield from try_rank(space, results, second, rate)
        yield from walk(space, results, predicted_rank(space, results, second), rate)
        yield from support(space, results)
        yield from confirm(space, results)

    def unbounded_cost(self) -> Cost:
        expected = find_rate_cost(self.space) + 1.5 * min(len(self.space.ranks) - 1, 3) + confirmation_cost(self.space)
        return Cost(expected, most_trainings(self.space))

    def least_trainings(self) -> float:
        return least_trainings(self.space)

    def most_script_arms(self) -> int:
        return 1 + most_stages(self.space)


def predicted_rank(space: Space, results: Results, second: int) -> int:
    """The smallest rank whose excess over the top is within the margin by b·(r^-c - R^-c), b from two ranks."""
    drop = results.best_loss(second) - results.best_loss(space.top)
    b = max(drop, 0.0) / (second**-DECAY - space.top**-DECAY)
    margin = space.margin_at(results.best_loss(space.top))
    return next(rank for rank in space.ranks if b * (rank**-DECAY - space.top**-DECAY) <= margin)
