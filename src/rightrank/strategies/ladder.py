"""`ladder`: the rate at the top rank, then ranks downward from where the law of diminishing returns says to look."""

from __future__ import annotations

import math

from rightrank.strategies.climb import Wanted
from rightrank.strategies.moves import try_rank, walk
from rightrank.strategies.results import Results
from rightrank.strategies.search import Search
from rightrank.strategies.space import Space

DECAY = 0.57  # median exponent c of L(r) = a + b·r^-c over 26 published curves (quartiles 0.38 to 0.64)


class Ladder(Search):
    """The top rank at its best rate; one rank a quarter of it; the law through both names where to walk from."""

    name = "ladder"

    def first_rank(self) -> int:
        return self.space.top

    def look(self, results: Results, rate: float) -> Wanted:
        second = self.space.a_quarter_of_the_top()
        yield from try_rank(self.space, results, second, rate)
        yield from walk(self.space, results, predicted_rank(self.space, results, second), rate)

    def expected_look(self) -> float:
        return min(2.5, len(self.space.ranks) - 1.0)


def predicted_rank(space: Space, results: Results, second: int) -> int:
    """The smallest rank whose excess over the top is within the margin by b·(r^-c - R^-c), b from two ranks."""
    drop = results.best_loss(second) - results.best_loss(space.top)
    b = max(drop, 0.0) / (second**-DECAY - space.top**-DECAY)
    margin = space.margin_at(results.best_loss(space.top))
    if not math.isfinite(b):  # the second rank gave no result
        return space.above(second) or space.top
    return next(rank for rank in space.ranks if b * (rank**-DECAY - space.top**-DECAY) <= margin)
