"""The frame that searches share: the rate at one rank, a look among the others from there, then making sure."""

from __future__ import annotations

from abc import abstractmethod

from rightrank.strategies.climb import Wanted
from rightrank.strategies.moves import confirm, confirmation_cost, most_stages, most_trainings, settle, support
from rightrank.strategies.protocol import Cost
from rightrank.strategies.rates import find_rate, find_rate_cost, least_trainings
from rightrank.strategies.results import Results
from rightrank.strategies.script import Scripted


class Search(Scripted):
    """A strategy that compares whole trainings, each rank at its best rate."""

    @abstractmethod
    def first_rank(self) -> int:
        """The rank at which rates are compared."""

    @abstractmethod
    def look(self, results: Results, rate: float) -> Wanted:
        """The other ranks; `rate` is the best of the first."""

    @abstractmethod
    def expected_look(self) -> float:
        """What looking costs in expectation, in whole trainings."""

    def script(self, results: Results) -> Wanted:
        rate = yield from find_rate(self.space, results, self.first_rank())
        if rate is None:
            return
        yield from self.look(results, rate)
        yield from settle(self.space, results)
        yield from support(self.space, results)
        yield from confirm(self.space, results)
        yield from settle(self.space, results)
        yield from confirm(self.space, results)

    def unbounded_cost(self) -> Cost:
        expected = find_rate_cost(self.space) + self.expected_look() + confirmation_cost(self.space)
        return Cost(expected, most_trainings(self.space))

    def least_trainings(self) -> float:
        return least_trainings(self.space)

    def most_script_arms(self) -> int:
        return 1 + most_stages(self.space)
