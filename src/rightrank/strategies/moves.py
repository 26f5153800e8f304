"""Moves that scripts are made of: find the rate at a rank, try a rank, walk to the lowest rank that holds."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from rightrank.records import Arm
from rightrank.strategies.climb import EARLY, Wanted, climb, early_arm, early_step
from rightrank.strategies.results import Results, within
from rightrank.strategies.space import Space

LATER = 0.5  # of a training: where the two best rates are compared again
PATIENCE = 1.5  # a higher rate behind at a quarter by more than this times what the better one gains until half is lost
HOPELESS = 2.0  # margins: a rank that fails by more was never rescued by a rate beside (by 1.5 at most, on 44 grids)
SIDE = 2.0  # margins: a rate that the top rank is worse at by more never rescued a lower one (by .9 at most)


def find_rate(space: Space, results: Results, rank: int) -> Generator[Sequence[Arm], None, float | None]:
    """The best rate at `rank`, None if no training ended: losers are stopped early where that can be had, else every
    rate tried is trained whole.

    Halving between rates (between ranks it is unsound: low ranks fall off late): a climb on values at a quarter of
    the way; the best goes on to half, the second too if it may still win; what may still win then goes on to the end.
    """
    if space.stages and len(space.rates) >= 3 and early_step(space, EARLY) != early_step(space, LATER):
        yield from climb(space, results, rank, part=EARLY)
        yield from _finish_the_best(space, results, rank)
    if results.best_rate(rank) is None and not _is_staged(space, results, rank):
        yield from climb(space, results, rank)
    return results.best_rate(rank)


def _is_staged(space: Space, results: Results, rank: int) -> bool:
    """Whether a training could be stopped early here."""
    return any(results.loss(early_arm(space, rank, rate, EARLY)) is not None for rate in space.rates)


def _finish_the_best(space: Space, results: Results, rank: int) -> Wanted:
    """From values at a quarter to whole trainings of those that may be the best."""
    quarter = {rate: results.loss(early_arm(space, rank, rate, EARLY)) for rate in space.rates}
    known = sorted((loss, rate) for rate, loss in quarter.items() if loss is not None)
    if not known:
        return
    ended = yield from _two_to_half(space, results, rank, known[:2])
    if ended:
        best = min(ended, key=lambda arm: (results.loss(arm), arm.learning_rate))
        yield [_going_on(results, arm) for arm in ended if arm.learning_rate >= best.learning_rate]
    for _, rate in known[2:]:  # only where the better ones diverged later on
        if results.best_rate(rank) is not None:
            return
        yield [_going_on(results, early_arm(space, rank, rate, EARLY))]


def _two_to_half(
    space: Space, results: Results, rank: int, known: Sequence[tuple[float, float]]
) -> Generator[Sequence[Arm], None, list[Arm]]:
    """The best at a quarter goes on to half, the second too unless it is lost; those that may still win are returned.

    `known` are (loss at a quarter, rate), the best first.
    """
    (quarter, first), *others = known
    ended: list[Arm] = []
    arm = _continued(space, results, rank, first, EARLY, early_step(space, LATER))
    yield [arm]
    half = results.loss(arm)
    if half is not None:
        ended.append(arm)
    for loss, rate in others:
        if half is not None and is_lost_at_quarter(rate > first, loss - quarter, quarter - half):
            continue
        arm = _continued(space, results, rank, rate, EARLY, early_step(space, LATER))
        yield [arm]
        other = results.loss(arm)
        if other is not None and (half is None or not is_lost_at_half(rate > first, other - half, quarter - half)):
            ended.append(arm)
    return ended


def is_lost_at_quarter(is_higher: bool, behind: float, gain: float) -> bool:
    """Whether a rate that is `behind` another one after a quarter can't win any more. `gain` is what the other gains from
    there to half: as long as that is to come, an order can turn. A lower rate is kept where the other gets worse.
    """
    return behind > PATIENCE * max(gain, 0.0) and (is_higher or gain > 0)


def is_lost_at_half(is_higher: bool, behind: float, gain: float) -> bool:
    """The same at half; `gain` is that of the other until here.

    A decaying schedule favours high rates late, so a higher one is given time; a lower one catches up only where the
    other gets worse, as on few items.
    """
    return is_lost_at_quarter(is_higher, behind, gain) or (not is_higher and behind > 0 and gain > 0)


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

    Those are left on the way where they can't win over `rate` any more.
    """
    yield [space.arm(rank, rate)]
    for side in side_rates(space, results, rank, rate):
        if results.holds(rank):
            return
        yield from _try_side(space, results, rank, rate, side)


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


def _try_side(space: Space, results: Results, rank: int, rate: float, side: float) -> Wanted:
    """Train `rank` at `side`, left on the way where it can't win over `rate` any more."""
    quarter, half = (results.loss_after(rank, rate, early_step(space, part)) for part in (EARLY, LATER))
    if not space.stages or quarter is None or half is None:
        yield [space.arm(rank, side)]
        return
    stage = early_arm(space, rank, side, EARLY)
    yield [stage]
    early = results.loss(stage)
    if early is None or is_lost_at_quarter(side > rate, early - quarter, quarter - half):
        return
    stage = _continued(space, results, rank, side, EARLY, early_step(space, LATER))
    yield [stage]
    later = results.loss(stage)
    if later is not None and not is_lost_at_half(side > rate, later - half, quarter - half):
        yield [_going_on(results, stage)]


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
