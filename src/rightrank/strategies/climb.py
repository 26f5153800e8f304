"""The climb along the learning rates at one rank."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TypeAlias

from rightrank.records import Arm
from rightrank.strategies.space import Space
from rightrank.strategies.trials import Trials
from rightrank.variants import Variant

Requests: TypeAlias = Iterator[Sequence[Arm]]  # what a script yields: arms that may run at the same time

QUARTER, HALF = 0.25, 0.5  # parts of a training after which learning rates are compared
# A climb upward that gains more than this share of the loss is checked downward. On 16 published grids a higher learning
# rate gained at most .026 where training worked, and .08 where the higher one was too high to train.
MAX_PLAUSIBLE_GAIN = 0.05


def climb(
    space: Space,
    trials: Trials,
    rank: int,
    start: float | None = None,
    variant: Variant | None = None,
) -> Requests:
    """Climb from `start` to a learning rate that is better than both its neighbours.

    The loss has one valley over the logarithm of the learning rate, so the climb ends where a search over all of them would.
    Learning rates that are far too high are an exception: there the loss is flat, and a higher one may look better. A
    doubtful climb upward, and one whose start gave no result, is therefore followed by a climb downward.

    Args:
        start: the first learning rate; None for the upper middle of the space.
        variant: a value of a sweep that all arms of the climb have.
    """
    learning_rates = space.learning_rates

    def arm(place: int) -> Arm:
        found = space.arm(rank, learning_rates[place])
        return found if variant is None else variant.of(found, space.scaling)

    first = learning_rates.index(start) if start is not None else len(learning_rates) // 2
    yield [arm(first)]
    best = first
    if not trials.diverged(arm(first)):
        best = yield from _climb_one_way(trials, arm, first, 1, len(learning_rates))
    if best > first and not _is_doubtful(trials, arm(first), arm(best), is_edge=best == len(learning_rates) - 1):
        return
    yield from _climb_one_way(trials, arm, first, -1, len(learning_rates))


def _climb_one_way(
    trials: Trials, arm: Callable[[int], Arm], best: int, step: int, count: int
) -> Generator[Sequence[Arm], None, int]:
    """Try one place after the other until the loss rises, and return the best place.

    A place without a result is skipped, except that a divergence ends a climb upward.
    """
    place = best + step
    while 0 <= place < count:
        yield [arm(place)]
        if _is_better(trials, arm(place), arm(best)):
            best = place
        elif trials.finished(arm(place)) is not None or (step > 0 and trials.diverged(arm(place))):
            break
        place += step
    return best


def _is_doubtful(trials: Trials, start: Arm, best: Arm, *, is_edge: bool) -> bool:
    """Whether the winner of a climb upward may be a learning rate that is too high to train.

    It may be if it is worse than the base. Where the base is unknown: if it is the highest of all and gained more than
    `MAX_PLAUSIBLE_GAIN`.
    """
    base = trials.base_loss()
    before, loss = trials.loss(start), trials.loss(best)
    if before is None or loss is None:
        return True
    return loss > base if base is not None else is_edge and before - loss > MAX_PLAUSIBLE_GAIN * abs(before)


def early_step(space: Space, part: float) -> int:
    """The optimizer step at which `part` of a training is done, at least 1."""
    return max(1, round(part * space.steps))


def early_arm(space: Space, rank: int, learning_rate: float, part: float) -> Arm:
    """A training that stops after `part` of its steps."""
    return space.arm(rank, learning_rate).model_copy(update={"stop_at": early_step(space, part)})


def _is_better(trials: Trials, arm: Arm, other: Arm) -> bool:
    """Whether `arm` ended with a lower loss. An arm without a result is worse than any."""
    loss, other_loss = trials.loss(arm), trials.loss(other)
    return loss is not None and (other_loss is None or loss < other_loss)
