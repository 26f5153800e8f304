"""The rate at a rank: losers are left on the way, and which rates can still win is said here."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from rightrank.records import Arm
from rightrank.strategies.climb import EARLY, Wanted, climb, early_arm, early_step
from rightrank.strategies.results import Results
from rightrank.strategies.space import Space

LATER = 0.5  # of a training: where the best rates are compared again
PATIENCE = 1.5  # a rate behind at a quarter by more than this times what the better one gains until half is lost
TRANSIENT = 1 / 3  # of what the better rate has learned since the base: a higher one further behind has not settled


def find_rate(space: Space, results: Results, rank: int) -> Generator[Sequence[Arm], None, float | None]:
    """The best rate at `rank`, None if no training ended: losers are stopped early where that can be had, else every
    rate tried is trained whole.

    Halving between rates (between ranks it is unsound: low ranks fall off late): a climb on values at a quarter of
    the way; the best goes on to half, and those beside it that may still win; what may win then goes on to the end.
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
    first = known[0][1]
    ended = yield from _some_to_half(space, results, rank, first, [rate for _, rate in known[1:]])
    if ended:
        ended.sort(key=lambda arm: (results.loss(arm), arm.learning_rate))
        rivals = [arm for arm in ended[1:] if arm.learning_rate > ended[0].learning_rate]
        yield [_going_on(results, arm) for arm in (ended[0], *rivals[:1])]
        yield from _on_upward(space, results, rank, first)
    for _, rate in known[1:]:  # only where the better ones diverged later on
        if results.best_rate(rank) is not None:
            return
        yield from _whole(space, results, rank, rate)


def _some_to_half(
    space: Space, results: Results, rank: int, first: float, others: Sequence[float]
) -> Generator[Sequence[Arm], None, list[Arm]]:
    """The best at a quarter goes on to half, the rates beside it too unless they are lost; those that may still win are
    returned.
    """
    ended: list[Arm] = []
    for rate in [first, *(rate for rate in others if _are_neighbours(space, rate, first))]:
        if is_lost(space, results, rank, first, rate, EARLY):  # never so against itself
            continue
        arm = _to_half(space, results, rank, rate)
        yield [arm]
        if results.loss(arm) is not None and not is_lost(space, results, rank, first, rate, LATER):
            ended.append(arm)
    return ended


def _on_upward(space: Space, results: Results, rank: int, first: float) -> Wanted:
    """Where a rate above the first won, the next one above it is tried against it, and so on."""
    winner = results.best_rate(rank)
    while winner is not None and winner > first and winner < space.rates[-1]:
        above = space.rates[space.rates.index(winner) + 1]
        yield from challenge(space, results, rank, winner, above)
        if results.best_rate(rank) == winner:
            return
        winner = results.best_rate(rank)


def challenge(space: Space, results: Results, rank: int, holder: float, side: float) -> Wanted:
    """Train `rank` at `side`, left on the way where it can't win over `holder`, trained whole, any more."""
    known = [results.loss_after(rank, holder, early_step(space, part)) for part in (EARLY, LATER)]
    if not space.stages or None in known:
        yield [space.arm(rank, side)]
        return
    stage = early_arm(space, rank, side, EARLY)
    yield [stage]
    if results.loss(stage) is None or is_lost(space, results, rank, holder, side, EARLY):
        return
    stage = _to_half(space, results, rank, side)
    yield [stage]
    if results.loss(stage) is not None and not is_lost(space, results, rank, holder, side, LATER):
        yield [_going_on(results, stage)]


def is_lost(space: Space, results: Results, rank: int, holder: float, side: float, part: float) -> bool:
    """Whether `side`, trained up to `part`, can't win over `holder` any more; False where the holder's way is unknown."""
    steps = early_step(space, EARLY), early_step(space, LATER)
    quarter, half = (results.loss_after(rank, holder, step) for step in steps)
    side_quarter, side_half = (results.loss_after(rank, side, step) for step in steps)
    if quarter is None or half is None or side_quarter is None:
        return False
    gain = quarter - half
    if part == EARLY:
        base = results.base_loss(on_the_way=True)
        learned = 0.0 if base is None else base - quarter
        return is_lost_at_quarter(side > holder, side_quarter - quarter, gain, learned)
    if side_half is None:
        return False
    return is_lost_at_half(side > holder, side_half - half, gain, side_quarter - side_half - gain)


def is_lost_at_quarter(is_higher: bool, behind: float, gain: float, learned: float = 0.0) -> bool:
    """Whether a rate that is `behind` another one after a quarter can't win any more. `gain` is what the other gains from
    there to half: as long as that is to come, an order can turn. A lower rate is kept where the other gets worse.

    A higher rate that is behind by a large part of all that the other has `learned` since the base has not settled yet:
    what the other still gains says nothing of it.
    """
    is_settled = not (is_higher and TRANSIENT * learned < behind < learned)
    return is_settled and behind > PATIENCE * max(gain, 0.0) and (is_higher or gain > 0)


def is_lost_at_half(is_higher: bool, behind: float, gain: float, closing: float = 0.0) -> bool:
    """The same at half; `gain` is that of the other in the quarter before, `closing` by how much the distance fell in it.

    A decaying schedule favours high rates late, so a higher one is given time, and all the more where the last quarter's
    pace would bring it level in one more; a lower one catches up only where the other gets worse, as on few items.
    """
    if is_higher:
        return behind > max(PATIENCE * gain, closing, 0.0)
    return behind > 0 and gain > 0


def _are_neighbours(space: Space, rate: float, other: float) -> bool:
    return abs(space.rates.index(rate) - space.rates.index(other)) == 1


def _to_half(space: Space, results: Results, rank: int, rate: float) -> Arm:
    """The arm that goes on from a quarter of a training to half of it."""
    return _going_on(results, early_arm(space, rank, rate, EARLY), early_step(space, LATER))


def _going_on(results: Results, stopped: Arm, stop_at: int | None = None) -> Arm:
    """The arm that goes on from a stopped one: to `stop_at`, else to its end."""
    before = results.finished(stopped)
    assert before is not None
    return stopped.model_copy(update={"stop_at": stop_at, "continue_from": before.trial_id})


def _whole(space: Space, results: Results, rank: int, rate: float) -> Wanted:
    """The rest of a training that was left on the way."""
    half = _to_half(space, results, rank, rate)
    if half not in results.outcomes:
        yield [_going_on(results, early_arm(space, rank, rate, EARLY))]
    elif results.finished(half) is not None:
        yield [_going_on(results, half)]


def find_rate_cost(space: Space) -> float:
    """Expected: three rates to a quarter, two or three of them to half, one or two to the end."""
    return 2.0 if len(space.rates) >= 3 else float(len(space.rates))


def least_trainings(space: Space) -> float:
    """One rank's rate at its dearest, losers stopped early, and one training of another rank."""
    rates = len(space.rates)
    return 1.0 + (rates if rates < 3 else rates * EARLY + 2 * (1 - EARLY) + (LATER - EARLY))
