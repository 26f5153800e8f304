"""Moves that scripts are made of: find the rate at a rank, try a rank, walk to the lowest rank that holds."""

from __future__ import annotations

from collections.abc import Sequence

from rightrank.records import Arm
from rightrank.strategies.results import Results
from rightrank.strategies.script import Wanted
from rightrank.strategies.space import Space


def search_rates(space: Space, results: Results, rank: int, start: float | None = None) -> Wanted:
    """Climb along the rates at `rank` from `start` (the upper middle) to one that is better than both neighbours.

    Loss against the logarithm of the rate has one valley, so the climb ends where the whole ladder would.
    """
    rates = space.rates
    here = rates.index(start) if start is not None else len(rates) // 2
    yield [space.arm(rank, rates[here])]
    for direction in (1, -1):
        moved = False
        while 0 <= here + direction < len(rates):
            beside = space.arm(rank, rates[here + direction])
            yield [beside]
            if not _better(results, beside, space.arm(rank, rates[here])):
                break
            here += direction
            moved = True
        if moved:
            return


def _better(results: Results, arm: Arm, other: Arm) -> bool:
    """Whether `arm` ended with a lower loss; an arm without a result is worse than any."""
    loss, other_loss = results.loss(arm), results.loss(other)
    return loss is not None and (other_loss is None or loss < other_loss)


def try_rank(space: Space, results: Results, rank: int, rate: float) -> Wanted:
    """Train `rank` at `rate`; where that fails the margin, also at the rates beside it until one holds."""
    yield [space.arm(rank, rate)]
    for side in side_rates(space, results, rate):
        if results.holds(rank):
            return
        yield [space.arm(rank, side)]


def side_rates(space: Space, results: Results, rate: float) -> Sequence[float]:
    """The rates beside `rate`, the one that did better at the top rank first (the lower, where unknown)."""
    place = space.rates.index(rate)
    beside = [space.rates[i] for i in (place - 1, place + 1) if 0 <= i < len(space.rates)]
    known = [side for side in beside if side in results.rates(space.top)]
    return sorted(beside, key=lambda side: (results.mean_loss(space.top, side) if side in known else float("inf"), side))


def walk(space: Space, results: Results, start: int, rate: float) -> Wanted:
    """From `start` downward while ranks hold; upward until one does where `start` itself fails."""
    rank: int | None = start
    while rank is not None and rank < space.top:
        yield from try_rank(space, results, rank, _nearby_rate(results, rank, rate))
        if results.holds(rank):
            break
        rank = space.above(rank)
    if rank != start or not results.holds(start):
        return
    rank = space.below(start)
    while rank is not None:
        yield from try_rank(space, results, rank, _nearby_rate(results, rank, rate))
        if not results.holds(rank):
            return
        rank = space.below(rank)


def _nearby_rate(results: Results, rank: int, otherwise: float) -> float:
    """The best rate of the nearest rank that has one."""
    tried = [other for other in results.ranks() if other != rank]
    nearest = min(tried, key=lambda other: max(other / rank, rank / other), default=None)
    found = None if nearest is None else results.best_rate(nearest)
    return otherwise if found is None else found
