"""Moves that scripts are made of: try a rank, walk to the lowest rank that holds, make sure of the answer."""

from __future__ import annotations

from collections.abc import Sequence

from rightrank.strategies.climb import EARLY, Wanted, early_step
from rightrank.strategies.rates import LATER, challenge
from rightrank.strategies.results import Results, within
from rightrank.strategies.space import Space

HOPELESS = 2.0  # margins: a rank that fails by more was never rescued by a rate beside (by 1.5 at most, on 44 grids)
SIDE = 2.0  # margins: a rate that the top rank is worse at by more never rescued a lower one (by .9 at most)


def try_rank(space: Space, results: Results, rank: int, rate: float) -> Wanted:
    """Train `rank` at `rate`; where that fails the margin, also at the rates beside it until one holds.

    Those are left on the way where they can't win over `rate` any more.
    """
    yield [space.arm(rank, rate)]
    for side in side_rates(space, results, rank, rate):
        if results.holds(rank):
            return
        yield from challenge(space, results, rank, rate, side)


def side_rates(space: Space, results: Results, rank: int, rate: float) -> Sequence[float]:
    """The rates beside `rate` that may make `rank` hold: both where `rate` gave no result, else those that the top
    rank is not far worse at, unless the rank fails by far; and a higher one where the rank had no time to learn.

    The one that did better at the top first; the lower, where unknown.
    """
    place = space.rates.index(rate)
    beside = [space.rates[i] for i in (place - 1, place + 1) if 0 <= i < len(space.rates)]
    behind = {side: _behind_at_top(space, results, side, rate) for side in beside}
    if rank in results.ranks():
        limit = SIDE * space.margin_at(results.best_loss(space.top))
        hopeless, slow = _fails_by_far(space, results, rank), _is_slow(space, results, rank, rate)
        beside = [s for s in beside if (behind[s] <= limit and not hopeless) or (s > rate and slow)]
    return sorted(beside, key=lambda side: (behind[side], side))


def _fails_by_far(space: Space, results: Results, rank: int) -> bool:
    """So far from holding that no rate beside could make up for it."""
    reference = results.reference()
    if reference is None:
        return False
    return results.excess(rank, reference).mean > HOPELESS * space.margin_at(results.best_loss(reference))


def _is_slow(space: Space, results: Results, rank: int, rate: float) -> bool:
    """Whether the rank fails at `rate` for want of time: the top's adapter cut to it holds, so it has the capacity, and
    in the second half of its own training it still gained more than it lacks.
    """
    top = results.best_loss(space.top)
    cuts = [arm for arm in results.outcomes if arm.rank == rank and arm.truncate_from is not None and arm.steps == 0]
    known = [loss for loss in (results.loss(cut) for cut in cuts) if loss is not None]
    half = results.loss_after(rank, rate, early_step(space, LATER))
    end = results.loss_after(rank, rate, space.steps)
    if not known or half is None or end is None:
        return False
    return within(min(known) - top, space.margin_at(top)) and half - end > end - top


def _behind_at_top(space: Space, results: Results, side: float, rate: float) -> float:
    """How much worse the top rank is at `side` than at `rate`, as far as both were trained; 0 where unknown."""
    for step in (space.steps, early_step(space, LATER), early_step(space, EARLY)):
        at_side, at_rate = (results.loss_after(space.top, one, step) for one in (side, rate))
        if at_side is not None and at_rate is not None:
            return at_side - at_rate
    return 0.0


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


def settle(space: Space, results: Results) -> Wanted:
    """Where the top is beaten by more than the margin the best lies below it, so the rank above the best one known is
    tried until that is no better; and the answer's next lower rank, where it was not.
    """
    for _ in range(2 * len(space.ranks)):
        chosen, best = results.smallest_that_holds(), results.reference()
        if chosen is None or best is None:
            return
        above = space.above(best) if space.top in results.ranks() and not results.holds(space.top) else None
        below = space.below(chosen)
        rank = next((rank for rank in (above, below) if rank is not None and not _is_tried(results, rank)), None)
        if rank is None:
            return
        yield from try_rank(space, results, rank, _nearby_rate(results, rank, space.rates[0]))


def _is_tried(results: Results, rank: int) -> bool:
    """Whether a whole training of the rank was asked for, whatever became of it."""
    return any(arm.rank == rank and arm.truncate_from is None for arm in results.outcomes)


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
    """The further seeds of the rank chosen, the next lower one trained, the reference and the best rank above that, which
    a single seed may have put below it, until the choice stays.
    """
    for _ in range(len(space.ranks)):
        chosen, reference = results.smallest_that_holds(), results.reference()
        if chosen is None or reference is None or len(space.seeds) < 2:
            return
        lower = max((rank for rank in results.ranks() if rank < chosen), default=chosen)
        above = [rank for rank in results.ranks() if rank > reference]
        rival = min(above, key=lambda rank: (results.best_loss(rank), rank), default=reference)
        rates = {rank: results.best_rate(rank) for rank in (chosen, lower, reference, rival)}
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


def confirmation_cost(space: Space) -> float:
    return 3.0 * (len(space.seeds) - 1)
