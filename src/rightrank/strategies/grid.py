"""`grid`: every rank at every learning rate with every seed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from rightrank.records import Arm
from rightrank.strategies.climb import Wanted
from rightrank.strategies.protocol import Cost
from rightrank.strategies.results import Results
from rightrank.strategies.script import Scripted


class Grid(Scripted):
    """Exhaustive. The base first; then seed by seed, from the extreme ranks inwards.

    The lowest and the highest rank come first so that the curve has its two ends early.
    """

    name = "grid"

    def script(self, results: Results) -> Wanted:
        yield self._arms()

    def unbounded_cost(self) -> Cost:
        return Cost(len(self._arms()), len(self._arms()))

    def most_script_arms(self) -> int:
        return 1 + len(self._arms())

    def least_trainings(self) -> float:
        return 2.0

    def _arms(self) -> list[Arm]:
        space = self.space
        cells = product(space.seeds, space.rates, outside_in(space.ranks))
        return [space.arm(rank, rate, seed) for seed, rate, rank in cells]


def outside_in(ranks: Sequence[int]) -> list[int]:
    """Highest, lowest, second highest, second lowest, …"""
    left = sorted(ranks)
    order: list[int] = []
    while left:
        order.append(left.pop(-1 if len(order) % 2 == 0 else 0))
    return order
