"""`grid`: every rank at every learning rate with every seed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from rightrank.records import Arm
from rightrank.strategies.adapter_question import answer_adapter_question, max_adapter_arms, max_adapter_cost
from rightrank.strategies.climb import Requests
from rightrank.strategies.protocol import CostEstimate
from rightrank.strategies.script import Scripted
from rightrank.strategies.trials import Trials


class Grid(Scripted):
    """The exhaustive grid: seed by seed, from the extreme ranks inward, so that both ends of the curve are known early.

    The first question is answered from the top rank at its best learning rate, once the grid is complete.
    """

    name = "grid"

    def script(self, trials: Trials) -> Requests:
        yield self._arms()
        top = self.space.top
        learning_rate = min(self.space.learning_rates, key=lambda lr: (trials.whole_loss(top, lr), lr))
        yield from answer_adapter_question(self.space, trials, learning_rate)

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
