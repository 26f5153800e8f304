"""`ascend`: start at the lowest rank and go up while it pays."""

from __future__ import annotations

from rightrank.strategies.climb import Requests
from rightrank.strategies.ladder import DECAY
from rightrank.strategies.moves import try_rank
from rightrank.strategies.search import Search
from rightrank.strategies.trials import Trials


class Ascend(Search):
    """Find the learning rate at the lowest rank, then train rank by rank upward until the predicted rest is within the margin."""

    name = "ascend"

    def first_rank(self) -> int:
        return self.space.ranks[0]

    def explore(self, trials: Trials, learning_rate: float) -> Requests:
        space, rank = self.space, self.space.ranks[0]
        while (higher := space.above(rank)) is not None:
            yield from try_rank(space, trials, higher, learning_rate)
            if remaining_gain(trials, rank, higher) <= space.margin_at(trials.best_loss(rank)):
                return
            rank, learning_rate = higher, trials.best_learning_rate(higher) or learning_rate

    def exploration_cost(self) -> float:
        return 1.5 * (len(self.space.ranks) - 1) / 2


def remaining_gain(trials: Trials, rank: int, higher: int) -> float:
    """The gain over `rank` at r → ∞ by the law a + b·r^-c through `rank` and `higher`."""
    gain = trials.best_loss(rank) - trials.best_loss(higher)
    return gain / (1 - (higher / rank) ** -DECAY) if gain > 0 else 0.0
