"""The climb along learning rates at one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from rightrank.records import Arm
from rightrank.strategies.results import Results
from rightrank.strategies.space import Space
from rightrank.strategies.sweep import Variant

Wanted: TypeAlias = Iterator[Sequence[Arm]]  # what a script yields

EARLY = 0.25  # of a training: where rates are first compared


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

    Loss against the logarithm of the rate has one valley, so the climb ends where the whole ladder would. With
    `part`, trainings stop after that part and are compared there; with `variant`, they have its setting.
    """
    rates = space.rates

    def arm(place: int) -> Arm:
        found = space.arm(rank, rates[place]) if part is None else early_arm(space, rank, rates[place], part)
        return found if variant is None else variant.of(found, space.scaling)

    here = rates.index(start) if start is not None else len(rates) // 2
    yield [arm(here)]
    if part is not None and results.finished(arm(here)) is None:
        return
    for direction in (1, -1):
        moved = False
        while 0 <= here + direction < len(rates):
            yield [arm(here + direction)]
            if not _better(results, arm(here + direction), arm(here)):
                break
            here += direction
            moved = True
        if moved:
            return


def early_step(space: Space, part: float) -> int:
    return max(1, round(part * space.steps))


def early_arm(space: Space, rank: int, rate: float, part: float) -> Arm:
    """A training stopped after a part of its steps."""
    return space.arm(rank, rate).model_copy(update={"stop_at": early_step(space, part)})


def _better(results: Results, arm: Arm, other: Arm) -> bool:
    """Whether `arm` ended with a lower loss; an arm without a result is worse than any."""
    loss, other_loss = results.loss(arm), results.loss(other)
    return loss is not None and (other_loss is None or loss < other_loss)
