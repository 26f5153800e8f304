"""The frame of the strategies that compare whole trainings, each rank at its best learning rate."""

from __future__ import annotations

from abc import abstractmethod

from rightrank.strategies.climb import Requests
from rightrank.strategies.learning_rates import find_learning_rate, find_learning_rate_cost, min_trainings
from rightrank.strategies.moves import confirm, confirmation_cost, max_trainings, settle, support
from rightrank.strategies.protocol import CostEstimate
from rightrank.strategies.script import Scripted
from rightrank.strategies.trials import Trials


class Search(Scripted):
    """Find the learning rate at one rank, explore the other ranks from there, then confirm the result."""

    @abstractmethod
    def first_rank(self) -> int:
        """The rank at which learning rates are compared."""

    @abstractmethod
    def explore(self, trials: Trials, learning_rate: float) -> Requests:
        """Train other ranks, starting from the best learning rate of the first."""

    @abstractmethod
    def exploration_cost(self) -> float:
        """The expected cost of `explore` in whole trainings."""

    def script(self, trials: Trials) -> Requests:
        learning_rate = yield from find_learning_rate(self.space, trials, self.first_rank())
        if learning_rate is None:
            return
        yield from self.explore(trials, learning_rate)
        yield from settle(self.space, trials)
        yield from support(self.space, trials)
        yield from confirm(self.space, trials)
        yield from settle(self.space, trials)
        yield from confirm(self.space, trials)

    def unbounded_cost(self) -> CostEstimate:
        expected = find_learning_rate_cost(self.space) + self.exploration_cost() + confirmation_cost(self.space)
        return CostEstimate(expected, max_trainings(self.space))

    def min_trainings(self) -> float:
        return min_trainings(self.space)

    def max_script_arms(self) -> int:
        return 1 + 3 * max_trainings(self.space)  # a training comes in up to three stages
