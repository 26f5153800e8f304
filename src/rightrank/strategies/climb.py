"""The climb along learning rates at one rank."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TypeAlias

from rightrank.records import Arm
from rightrank.strategies.results import Results
from rightrank.strategies.space import Space
from rightrank.variants import Variant

Wanted: TypeAlias = Iterator[Sequence[Arm]]  # what a script yields

EARLY = 0.25  # of a training: where rates are first compared
LEAP = 0.05  # of the loss: rates upward gained less than this on 16 published grids (.026 at most), more where broken (.08)


def climb(
    space: Space,
    results: Results,
    rank: int,
    start: float | None = None,
    *,
    part: float | None = None,
    variant: Variant | None = None,
) -> Wanted:
    """Climb along the rates at `rank` from `start` (the upper middle) to one that is better than both neighbours.

    Loss against the logarithm of the rate has one valley, so the climb ends where the whole ladder would. But rates far too
    high level off, and among them a higher one may be the better: a doubtful climb upward is followed by one down, and so
    is one from a place without a result. With `part`, trainings stop after that part and are compared there; with
    `variant`, they have its setting.
    """
    rates = space.rates

    def arm(place: int) -> Arm:
        found = space.arm(rank, rates[place]) if part is None else early_arm(space, rank, rates[place], part)
        return found if variant is None else variant.of(found, space.scaling)

    here = rates.index(start) if start is not None else len(rates) // 2
    yield [arm(here)]
    found = here
    if not results.diverged(arm(here)):
        if part is not None and results.finished(arm(here)) is None:
            return  # trainings can't be stopped here
        found = yield from _run(results, arm, here, 1, len(rates))
    if found > here and not _is_doubtful(results, arm(here), arm(found), is_edge=found == len(rates) - 1):
        return
    yield from _run(results, arm, here, -1, len(rates))


def _run(
    results: Results, arm: Callable[[int], Arm], here: int, step: int, count: int
) -> Generator[Sequence[Arm], None, int]:
    """From place to place while it gets better; the best place is returned. A place without a result is stepped over,
    but for one that diverged on the way upward.
    """
    place = here + step
    while 0 <= place < count:
        yield [arm(place)]
        if _better(results, arm(place), arm(here)):
            here = place
        elif results.finished(arm(place)) is not None or (step > 0 and results.diverged(arm(place))):
            break
        place += step
    return here


def _is_doubtful(results: Results, start: Arm, best: Arm, *, is_edge: bool) -> bool:
    """Whether a rate that won on the way upward may lie beyond the valley, where trainings are broken: it is worse than the
    base or, where that is unknown, the highest of all and a leap away from the start.
    """
    base = results.base_loss(on_the_way=best.stop_at is not None)
    before, loss = results.loss(start), results.loss(best)
    if before is None or loss is None:
        return True
    return loss > base if base is not None else is_edge and before - loss > LEAP * abs(before)


def early_step(space: Space, part: float) -> int:
    return max(1, round(part * space.steps))


def early_arm(space: Space, rank: int, rate: float, part: float) -> Arm:
    """A training stopped after a part of its steps."""
    return space.arm(rank, rate).model_copy(update={"stop_at": early_step(space, part)})


def _better(results: Results, arm: Arm, other: Arm) -> bool:
    """Whether `arm` ended with a lower loss; an arm without a result is worse than any."""
    loss, other_loss = results.loss(arm), results.loss(other)
    return loss is not None and (other_loss is None or loss < other_loss)
