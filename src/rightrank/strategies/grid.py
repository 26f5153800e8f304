"""`grid`: every rank at every learning rate with every seed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from rightrank.records import Arm
from rightrank.settings import SelectSettings
from rightrank.strategies.protocol import History, base_arm


class Grid:
    """Exhaustive. The base first; then seed by seed, from the extreme ranks inwards.

    The lowest and the highest rank come first so that the curve has its two ends early.
    """

    name = "grid"

    def __init__(self, settings: SelectSettings, steps: int) -> None:
        self._settings = settings
        self._steps = steps

    def ask(self, history: History) -> Sequence[Arm]:
        return [arm for arm in self._arms() if not history.has_ended(arm)]

    def most_arms(self) -> int:
        return len(self._arms())

    def _arms(self) -> list[Arm]:
        settings = self._settings
        cells = product(settings.seeds, settings.learning_rates, outside_in(settings.ranks))
        trained = [
            Arm(rank=rank, learning_rate=rate, lora_alpha=settings.lora_alpha, seed=seed, steps=self._steps)
            for seed, rate, rank in cells
        ]
        return [base_arm(settings.lora_alpha), *trained]


def outside_in(ranks: Sequence[int]) -> list[int]:
    """Highest, lowest, second highest, second lowest, …"""
    left = sorted(ranks)
    order: list[int] = []
    while left:
        order.append(left.pop(-1 if len(order) % 2 == 0 else 0))
    return order
