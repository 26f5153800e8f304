"""`bracket`: the truncations of the top rank's adapter say where to look; trainings beside it say what is right."""

from __future__ import annotations

from rightrank.decision.judge import walk_down
from rightrank.records import Arm
from rightrank.strategies.climb import Wanted
from rightrank.strategies.ladder import predicted_rank
from rightrank.strategies.moves import try_rank, walk
from rightrank.strategies.results import Results, excess_of, within
from rightrank.strategies.search import Search
from rightrank.strategies.space import Space


class Bracket(Search):
    """The rate at the top rank; that adapter cut to every lower rank, for the price of evaluations; then direct
    trainings downward from the smallest cut that loses less than the margin, until the first rank that fails.

    Where no truncation can be had (a table of finished runs), a training at a quarter of the top takes its place.
    """

    name = "bracket"

    def first_rank(self) -> int:
        return self.space.top

    def look(self, results: Results, rate: float) -> Wanted:
        space = self.space
        cuts = truncations(space, results, space.top, rate)
        yield cuts
        start = smallest_cut_that_holds(space, results, cuts, rate)
        if start is None:
            second = space.a_quarter_of_the_top()
            yield from try_rank(space, results, second, rate)
            start = predicted_rank(space, results, second)
        elif start == space.top:
            start = space.below(start) or start
        yield from walk(space, results, start, rate)

    def expected_look(self) -> float:
        return min(2.0, len(self.space.ranks) - 1.0)

    def most_script_arms(self) -> int:
        return super().most_script_arms() + len(self.space.ranks) - 1


def truncations(space: Space, results: Results, rank: int, rate: float) -> list[Arm]:
    """The adapter of a finished training cut to every lower rank, without recovery; descending."""
    parent = results.direct().get((rank, rate, space.seeds[0]))
    if parent is None or not space.stages:
        return []
    return [
        space.arm(lower, rate).model_copy(update={"steps": 0, "truncate_from": parent.trial_id})
        for lower in reversed(space.ranks)
        if lower < rank
    ]


def smallest_cut_that_holds(space: Space, results: Results, cuts: list[Arm], rate: float) -> int | None:
    """From the top downward before the first cut that loses more than the margin; None where no cut has a result."""
    parent = results.direct().get((space.top, rate, space.seeds[0]))
    if parent is None or not any(results.finished(cut) for cut in cuts):
        return None
    known = {cut.rank: outcome for cut in cuts if (outcome := results.finished(cut)) is not None}
    margin = space.margin_at(results.best_loss(space.top))
    return walk_down(known, space.top, lambda rank: within(excess_of([(known[rank], parent)], space).mean, margin))
