"""`ascend`: start small, go up while it pays and the budget allows."""

from __future__ import annotations

from rightrank.strategies.climb import Wanted
from rightrank.strategies.ladder import DECAY
from rightrank.strategies.moves import try_rank
from rightrank.strategies.results import Results
from rightrank.strategies.search import Search


class Ascend(Search):
    """The rate at the lowest rank; then rank by rank upward until what is still to come is within the margin."""

    name = "ascend"

    def first_rank(self) -> int:
        return self.space.ranks[0]

    def look(self, results: Results, rate: float) -> Wanted:
        space, rank = self.space, self.space.ranks[0]
        while (higher := space.above(rank)) is not None:
            yield from try_rank(space, results, higher, rate)
            if still_to_come(results, rank, higher) <= space.margin_at(results.best_loss(rank)):
                return
            rank, rate = higher, results.best_rate(higher) or rate

    def expected_look(self) -> float:
        return 1.5 * (len(self.space.ranks) - 1) / 2


def still_to_come(results: Results, rank: int, higher: int) -> float:
    """How much ranks beyond `rank` can gain over it: the law a + b·r^-c through it and the next, at r → ∞."""
    gain = results.best_loss(rank) - results.best_loss(higher)
    return gain / (1 - (higher / rank) ** -DECAY) if gain > 0 else 0.0
