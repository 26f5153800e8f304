"""The moves of scripts: try a rank, walk to the lowest rank that holds, confirm the result."""

from __future__ import annotations

from collections.abc import Sequence

from rightrank.decision.comparison import is_within
from rightrank.search.history import Trials
from rightrank.search.learning_rates import (
    ANNEAL,
    HALF,
    LOOK,
    QUARTER,
    Requests,
    challenge,
    early_step,
    max_search_trainings,
    train,
)
from rightrank.search.space import Space

# Both in margins, from 44 grids: a neighbouring learning rate made up for at most 1.5 of a rank's excess, and one at which
# the top rank is worse by more than .9 never helped a lower rank.
MAX_RECOVERABLE_EXCESS = 2.0
MAX_DEFICIT_AT_TOP = 2.0


def try_rank(trials: Trials, rank: int, learning_rate: float) -> Requests:
    """Train `rank` at `learning_rate`, and at neighbouring learning rates until one makes it hold.

    The latter are trained whole only where their look beats that of `learning_rate`.
    """
    yield from train(trials, rank, learning_rate)
    for neighbour in _promising_neighbours(trials, rank, learning_rate):
        if trials.holds(rank):
            return
        yield from challenge(trials, rank, learning_rate, neighbour)


def _promising_neighbours(trials: Trials, rank: int, learning_rate: float) -> Sequence[float]:
    """The neighbours of `learning_rate` that may make `rank` hold, the one that did better at the top rank first.

    Both where `learning_rate` gave no result. Otherwise a neighbour at which the top rank is about as good, unless the rank
    fails by far; and the higher neighbour where the rank is undertrained.
    """
    space = trials.space
    place = space.learning_rates.index(learning_rate)
    neighbours = [space.learning_rates[i] for i in (place - 1, place + 1) if 0 <= i < len(space.learning_rates)]
    behind = {lr: _deficit_at_top(trials, lr, learning_rate) for lr in neighbours}
    if rank in trials.ranks():
        limit = MAX_DEFICIT_AT_TOP * space.margin_at(trials.best_loss(space.top))
        reference = trials.reference()
        fails_by_far = reference is not None and not is_within(
            trials.excess(rank, reference).mean,
            MAX_RECOVERABLE_EXCESS * space.margin_at(trials.best_loss(reference)),
        )
        is_slow = _is_undertrained(trials, rank, learning_rate)
        neighbours = [
            lr
            for lr in neighbours
            if (behind[lr] <= limit and not fails_by_far)
            or (lr > learning_rate and is_slow and not _lost_at_top(trials, lr))
        ]
    return sorted(neighbours, key=lambda lr: (behind[lr], lr))


def _is_undertrained(trials: Trials, rank: int, learning_rate: float) -> bool:
    """Whether more training, rather than more rank, may make the rank hold.

    It may if the top adapter truncated to this rank holds, and if the rank gained more in the second half of its own
    training than it still lacks.
    """
    space = trials.space
    top = trials.best_loss(space.top)
    truncated = [arm for arm in trials.outcomes if arm.rank == rank and arm.truncate_from and arm.steps == 0]
    known = [loss for loss in map(trials.loss, truncated) if loss is not None]
    half = trials.loss_after(rank, learning_rate, early_step(space, HALF))
    end = trials.loss_after(rank, learning_rate, space.steps)
    if not known or half is None or end is None:
        return False
    return is_within(min(known) - top, space.margin_at(top)) and half - end > end - top


def _deficit_at_top(trials: Trials, neighbour: float, learning_rate: float) -> float:
    """How much worse the top rank is at `neighbour`, at the latest step that both reached; 0 where unknown."""
    space = trials.space
    for step in (space.steps, *(early_step(space, part) for part in (HALF, QUARTER, LOOK))):
        losses = [trials.loss_after(space.top, lr, step) for lr in (neighbour, learning_rate)]
        if losses[0] is not None and losses[1] is not None:
            return losses[0] - losses[1]
    return 0.0


def _lost_at_top(trials: Trials, learning_rate: float) -> bool:
    """Whether the top rank at this learning rate ended, or stood halfway, no better than the base."""
    space = trials.space
    for step in (space.steps, early_step(space, HALF)):
        loss = trials.loss_after(space.top, learning_rate, step)
        base = trials.base_loss(during_training=step < space.steps)
        if loss is not None and base is not None:
            return loss >= base
    return False


def walk(trials: Trials, start: int, learning_rate: float) -> Requests:
    """Train from `start` downward until a rank fails; upward until a rank holds where `start` itself fails."""
    space = trials.space
    rank: int | None = start
    while rank is not None and rank < space.top:
        yield from try_rank(trials, rank, _nearest_learning_rate(trials, rank, learning_rate))
        if trials.holds(rank):
            break
        rank = space.above(rank)
    if rank != start or not trials.holds(start):
        return
    rank = space.below(start)
    while rank is not None:
        yield from try_rank(trials, rank, _nearest_learning_rate(trials, rank, learning_rate))
        if not trials.holds(rank):
            return
        rank = space.below(rank)


def _nearest_learning_rate(trials: Trials, rank: int, otherwise: float) -> float:
    """The best learning rate of the nearest other rank that has one."""
    tried = [other for other in trials.ranks() if other != rank]
    nearest = min(tried, key=lambda other: max(other / rank, rank / other), default=None)
    found = None if nearest is None else trials.best_learning_rate(nearest)
    return otherwise if found is None else found


def settle(trials: Trials) -> Requests:
    """Train the ranks that may change the answer.

    These are the next lower rank below the answer; and, where the top rank is worse than the best one by more than the
    margin, the ranks above the best one until they get worse.
    """
    space = trials.space
    for _ in range(2 * len(space.ranks)):
        chosen, best = trials.smallest_that_holds(), trials.reference()
        if chosen is None or best is None:
            return
        above = space.above(best) if space.top in trials.ranks() and not trials.holds(space.top) else None
        below = space.below(chosen)
        rank = next((rank for rank in (above, below) if rank is not None and rank not in trials.asked()), None)
        if rank is None:
            return
        yield from try_rank(trials, rank, _nearest_learning_rate(trials, rank, space.learning_rates[0]))


def support(trials: Trials) -> Requests:
    """Train ranks above the chosen one until an upper bound holds: a fallback for the decision, which goes by bounds."""
    space = trials.space
    rank, reference = trials.smallest_that_holds(), trials.reference()
    while rank is not None and reference is not None and rank < reference and not trials.surely_holds(rank):
        rank = space.above(rank)
        if rank is None or rank >= reference or rank in trials.ranks():
            continue
        yield [space.arm(rank, _nearest_learning_rate(trials, rank, space.learning_rates[0]))]


def confirm(trials: Trials) -> Requests:
    """Train the further seeds of the ranks that the answer rests on, until it stays the same.

    These are the chosen rank, the next lower one, the reference, and the best rank above the reference, which may be
    better than it by more seeds.
    """
    space = trials.space
    for _ in range(len(space.ranks)):
        chosen, reference = trials.smallest_that_holds(), trials.reference()
        if chosen is None or reference is None or len(space.seeds) < 2:
            return
        lower = max((rank for rank in trials.ranks() if rank < chosen), default=chosen)
        above = [rank for rank in trials.ranks() if rank > reference]
        rival = min(above, key=lambda rank: (trials.best_loss(rank), rank), default=reference)
        best = {rank: trials.best_learning_rate(rank) for rank in (chosen, lower, reference, rival)}
        yield [space.arm(rank, lr, seed) for rank, lr in best.items() if lr is not None for seed in space.seeds[1:]]
        if trials.smallest_that_holds() == chosen and trials.reference() == reference:
            return


def max_trainings(space: Space) -> float:
    """An upper bound: all learning rates at the top, three at every other rank, and every further seed."""
    tried = min(len(space.learning_rates), 3)
    others = tried * (1 + 2 * ANNEAL) * (len(space.ranks) - 1)
    return max_search_trainings(space) + others + (len(space.seeds) - 1) * tried * len(space.ranks)


def confirmation_cost(space: Space) -> float:
    return 3.0 * (len(space.seeds) - 1)
