"""`ascend`: start small, go up while it pays and the budget allows."""

from __future__ import annotations

from rightrank.strategies.climb import Wanted
from rightrank.strategies.ladder import DECAY
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
)
from rightrank.strategies.protocol import Cost
from rightrank.strategies.results import Results
from rightrank.strategies.script import Scripted


class Ascend(Scripted):
    """The rate at the lowest rank; then rank by rank upward until what is still to come is within the margin."""

    name = "ascend"

    def script(self, results: Results) -> Wanted:
        space = self.space
        rank = space.ranks[0]
        yield from find_rate(space, results, rank)
        rate = results.best_rate(rank)
        while rate is not None and (higher := space.above(rank)) is not None:
            yield from try_rank(space, results, higher, rate)
            if still_to_come(results, rank, higher) <= space.margin_at(results.best_loss(rank)):
                break
            rank, rate = higher, results.best_rate(higher) or rate
        yield from support(space, results)
        yield from confirm(space, results)

    def unbounded_cost(self) -> Cost:
        space = self.space
        expected = find_rate_cost(space) + 1.5 * (len(space.ranks) - 1) / 2 + confirmation_cost(space)
        return Cost(expected, most_trainings(space))

    def least_trainings(self) -> float:
        return least_trainings(self.space)

    def most_script_arms(self) -> int:
        return 1 + most_stages(self.space)


def still_to_come(results: Results, rank: int, higher: int) -> float:
    """How much ranks beyond `rank` can gain over it: the law a + b·r^-c through it and the next, at r → ∞."""
    gain = results.best_loss(rank) - results.best_loss(higher)
    return gain / (1 - (higher / rank) ** -DECAY) if gain > 0 else 0.0
