"""Moves that scripts are made of: find the rate at a rank, try a rank, walk to the lowest rank that holds."""

from __future__ import annotations

from collections.abc import Sequence

from rightrank.records import Arm
from rightrank.strategies.climb import EARLY, Wanted, climb, early_arm, early_step
from rightrank.strategies.results import Results
from rightrank.strategies.space import Space

LATER = 0.5  # of a training: where the two best rates are compared again
HOPELESS = 3.0  # margins: a rank that fails by more was never rescued by a rate beside (by 1.5 at most, on 44 grids)


def find_rate(space: Space, results: Results, rank: int, start: float | None = None) -> Wanted:
    """The rate at `rank`: losers are stopped early where that can be had, else every rate tried is trained whole.

    Halving between rates (between ranks it is unsound: low ranks fall off late): a climb on values at a quarter of
    the way; the two best go on to half; the better of them to the end, and a higher one with it, since a decaying
    schedule favours higher rates late. A lower rate that is behind at half was never the best on the planted grids.
    """
    if not space.stages or len(space.rates) < 3 or early_step(space, EARLY) == early_step(space, LATER):
        yield from climb(space, results, rank, start)
        return
    yield from climb(space, results, rank, start, part=EARLY)
    quarter = {rate: results.loss(early_arm(space, rank, rate, EARLY)) for rate in space.rates}
    known = sorted((loss, rate) for rate, loss in quarter.items() if loss is not None)
    if not known:  # nothing can be stopped early here
        yield from climb(space, results, rank, start)
        return
    halves = [_continued(space, results, rank, rate, EARLY, early_step(space, LATER)) for _, rate in known[:2]]
    yield halves
    ended = [arm for arm in halves if results.finished(arm) is not None]
    if ended:
        best = min(ended, key=lambda arm: (results.loss(arm), arm.learning_rate))
        yield [_going_on(results, arm) for arm in ended if arm.learning_rate >= best.learning_rate]
    for _, rate in known[2:]:  # only where the better ones diverged later on
        if results.best_rate(rank) is not None:
            return
        yield [_going_on(results, early_arm(space, rank, rate, EARLY))]


def _continued(space: Space, results: Results, rank: int, rate: float, part: float, stop_at: int) -> Arm:
    """The arm that goes on from where `part` of a training ended, to `stop_at`."""
    before = results.finished(early_arm(space, rank, rate, part))
    assert before is not None
    return before.arm.model_copy(update={"stop_at": stop_at, "continue_from": before.trial_id})


def _going_on(results: Results, stopped: Arm) -> Arm:
    """The arm that goes on from a stopped one to its end."""
    before = results.finished(stopped)
    assert before is not None
    return stopped.model_copy(update={"stop_at": None, "continue_from": before.trial_id})


def try_rank(space: Space, results: Results, rank: int, rate: float) -> Wanted:
    """Train `rank` at `rate`; where that fails the margin, also at the rates beside it until one holds.

    A lower rate beside it goes only half of the way where it is no better there than `rate` was.
    """
    yield [space.arm(rank, rate)]
    for side in side_rates(space, results, rate):
        if results.holds(rank) or _hopeless(space, results, rank):
            return
        yield from _try_side(space, results, rank, rate, side)


def _hopeless(space: Space, results: Results, rank: int) -> bool:
    """So far from holding that no rate beside could make up for it; not so where there is no result at all."""
    reference = results.reference()
    if reference is None or rank not in results.ranks():
        return False
    margin = space.margin_at(results.best_loss(reference))
    return results.excess(rank, reference).mean > HOPELESS * margin


def _try_side(space: Space, results: Results, rank: int, rate: float, side: float) -> Wanted:
    mark = results.loss_on_the_way(space.arm(rank, rate), early_step(space, LATER)) if space.stages else None
    if mark is None or side > rate:
        yield [space.arm(rank, side)]
        return
    half = early_arm(space, rank, side, LATER)
    yield [half]
    reached = results.loss(half)
    if reached is not None and reached < mark:
        yield [_going_on(results, half)]


def side_rates(space: Space, results: Results, rate: float) -> Sequence[float]:
    """The rates beside `rate`, the one that did better at the top rank first (the lower, where unknown)."""
    place = space.rates.index(rate)
    beside = [space.rates[i] for i in (place - 1, place + 1) if 0 <= i < len(space.rates)]
    at_top = {side: _known_loss(space, results, side) for side in beside}
    return sorted(beside, key=lambda side: (at_top[side], side))


def _known_loss(space: Space, results: Results, rate: float) -> float:
    """The top rank's loss at `rate`, whole or at the quarter."""
    for arm in (space.arm(space.top, rate), early_arm(space, space.top, rate, EARLY)):
        loss = results.loss(arm)
        if loss is not None:
            return loss
    return float("inf")


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


def support(space: Space, results: Results) -> Wanted:
    """Ranks above the chosen one until a bound holds: the decision, which goes by bounds, then has what to fall back on.

    Asks for nothing where values alone are known.
    """
    rank, reference = results.smallest_that_holds(), results.reference()
    while rank is not None and reference is not None and rank < reference and not results.surely_holds(rank):
        rank = space.above(rank)
        if rank is None or rank >= reference or rank in results.ranks():
            continue
        rate = _nearby_rate(results, rank, space.rates[0])
        yield [space.arm(rank, rate)]


def confirm(space: Space, results: Results) -> Wanted:
    """The further seeds of the rank chosen, the next lower one trained and the reference, until the choice stays."""
    for _ in range(len(space.ranks)):
        chosen, reference = results.smallest_that_holds(), results.reference()
        if chosen is None or reference is None or len(space.seeds) < 2:
            return
        lower = max((rank for rank in results.ranks() if rank < chosen), default=chosen)
        rates = {rank: results.best_rate(rank) for rank in (chosen, lower, reference)}
        yield [
            space.arm(rank, rate, seed) for rank, rate in rates.items() if rate is not None for seed in space.seeds[1:]
        ]
        if results.smallest_that_holds() == chosen and results.reference() == reference:
            return


def most_trainings(space: Space) -> int:
    """Of a search for the rate at the top and a walk over every other rank: a bound, reached where all fails."""
    sides = min(len(space.rates), 3)
    first_seed = len(space.rates) + sides * (len(space.ranks) - 1)
    return first_seed + (len(space.seeds) - 1) * sides * len(space.ranks)


def most_stages(space: Space) -> int:
    """The arms behind `most_trainings`: a training comes in up to three stages."""
    return 3 * most_trainings(space)


def find_rate_cost(space: Space) -> float:
    """Expected: three rates to a quarter, two of them to half, one or two to the end."""
    return 2.0 if len(space.rates) >= 3 else float(len(space.rates))


def least_trainings(space: Space) -> float:
    """One rank's rate at its dearest, losers stopped early, and one training of another rank."""
    rates = len(space.rates)
    return 1.0 + (rates if rates < 3 else rates * EARLY + 2 * (1 - EARLY))


def confirmation_cost(space: Space) -> float:
    return 3.0 * (len(space.seeds) - 1)
