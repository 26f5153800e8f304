"""The search for the learning rate of one rank, with early stopping.

Trainings at several learning rates are compared after a quarter and after half of their steps, and those that can't win
stop there. This is successive halving between learning rates. Between ranks it would be unsound: a low rank falls behind
late. A challenger is compared with a holder, which is known up to half:

    behind   how much worse the challenger is than the holder
    gain     how much the holder gains between a quarter and half
    learned  how much the holder gains between the base and a quarter
    closing  by how much `behind` falls between a quarter and half

    =========  =======================================  ============================================
    compared   a lower learning rate stops early if     a higher learning rate stops early if
    =========  =======================================  ============================================
    a quarter  gain > 0 and behind > PATIENCE · gain    behind > PATIENCE · max(gain, 0), unless
                                                        learned · UNSETTLED < behind < learned
    half       gain > 0 and behind > 0                  behind > max(PATIENCE · gain, closing, 0)
    =========  =======================================  ============================================

The reasons: The order may turn as long as the holder still gains. A decaying schedule favours high learning rates late, so
a lower one that is behind at half catches up only if the holder gets worse, as it does where it overfits few examples. A
higher one that has learned something, but less than two thirds of what the holder has, is still settling, and the
holder's gain says nothing about it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from rightrank.records import Arm
from rightrank.strategies.climb import HALF, QUARTER, Requests, climb, early_arm, early_step
from rightrank.strategies.space import Space
from rightrank.strategies.trials import Trials

PATIENCE = 1.5  # times the holder's gain
UNSETTLED = 1 / 3  # of what the holder has learned since the base


def find_learning_rate(space: Space, trials: Trials, rank: int) -> Generator[Sequence[Arm], None, float | None]:
    """Return the best learning rate at `rank`, or None if no training finished.

    Trainings stop early where the trainer can do so and the space has three learning rates or more: a climb on values at a
    quarter, the best and its neighbours to half, the winners to the end. Otherwise every training is whole.
    """
    if space.stages and len(space.learning_rates) >= 3 and early_step(space, QUARTER) != early_step(space, HALF):
        yield from climb(space, trials, rank, part=QUARTER)
        yield from _finish_the_best(space, trials, rank)
    if trials.best_learning_rate(rank) is None and not _can_stop_early(space, trials, rank):
        yield from climb(space, trials, rank)
    return trials.best_learning_rate(rank)


def _can_stop_early(space: Space, trials: Trials, rank: int) -> bool:
    """Whether any training of the rank stopped at a quarter with a result."""
    return any(trials.loss(early_arm(space, rank, lr, QUARTER)) is not None for lr in space.learning_rates)


def _finish_the_best(space: Space, trials: Trials, rank: int) -> Requests:
    """Go from values at a quarter to whole trainings of the learning rates that may be the best."""
    quarter = {lr: trials.loss(early_arm(space, rank, lr, QUARTER)) for lr in space.learning_rates}
    known = sorted((loss, lr) for lr, loss in quarter.items() if loss is not None)
    if not known:
        return
    first = known[0][1]
    halfway = yield from _run_to_half(space, trials, rank, first, [lr for _, lr in known[1:]])
    if halfway:
        halfway.sort(key=lambda arm: (trials.loss(arm), arm.learning_rate))
        rivals = [arm for arm in halfway[1:] if arm.learning_rate > halfway[0].learning_rate]
        yield [_resumed(trials, arm) for arm in (halfway[0], *rivals[:1])]
        yield from _challenge_upward(space, trials, rank, first)
    for _, lr in known[1:]:  # only where the better ones diverged after half
        if trials.best_learning_rate(rank) is not None:
            return
        yield from _finish(space, trials, rank, lr)


def _run_to_half(
    space: Space, trials: Trials, rank: int, first: float, others: Sequence[float]
) -> Generator[Sequence[Arm], None, list[Arm]]:
    """Resume the best at a quarter, and its neighbours that do not stop early, to half; return those that may still win."""
    halfway: list[Arm] = []
    for lr in [first, *(lr for lr in others if _are_neighbours(space, lr, first))]:
        if stops_early(space, trials, rank, first, lr, QUARTER):  # never true of `first` itself
            continue
        arm = _to_half(space, trials, rank, lr)
        yield [arm]
        if trials.loss(arm) is not None and not stops_early(space, trials, rank, first, lr, HALF):
            halfway.append(arm)
    return halfway


def _challenge_upward(space: Space, trials: Trials, rank: int, first: float) -> Requests:
    """While a learning rate above `first` wins, let the next higher one challenge it."""
    winner = trials.best_learning_rate(rank)
    while winner is not None and winner > first and winner < space.learning_rates[-1]:
        above = space.learning_rates[space.learning_rates.index(winner) + 1]
        yield from challenge(space, trials, rank, winner, above)
        if trials.best_learning_rate(rank) == winner:
            return
        winner = trials.best_learning_rate(rank)


def challenge(space: Space, trials: Trials, rank: int, holder: float, challenger: float) -> Requests:
    """Train `rank` at `challenger` and stop early once it can't beat `holder`, a whole training."""
    known = [trials.loss_after(rank, holder, early_step(space, part)) for part in (QUARTER, HALF)]
    if not space.stages or None in known:
        yield [space.arm(rank, challenger)]
        return
    stage = early_arm(space, rank, challenger, QUARTER)
    yield [stage]
    if trials.loss(stage) is None or stops_early(space, trials, rank, holder, challenger, QUARTER):
        return
    stage = _to_half(space, trials, rank, challenger)
    yield [stage]
    if trials.loss(stage) is not None and not stops_early(space, trials, rank, holder, challenger, HALF):
        yield [_resumed(trials, stage)]


def stops_early(space: Space, trials: Trials, rank: int, holder: float, challenger: float, part: float) -> bool:
    """Whether `challenger`, trained up to `part`, can no longer beat `holder`. False where the holder's values are unknown."""
    steps = early_step(space, QUARTER), early_step(space, HALF)
    quarter, half = (trials.loss_after(rank, holder, step) for step in steps)
    challenger_quarter, challenger_half = (trials.loss_after(rank, challenger, step) for step in steps)
    if quarter is None or half is None or challenger_quarter is None:
        return False
    is_higher, gain = challenger > holder, quarter - half
    behind = challenger_quarter - quarter
    if part == QUARTER:
        base = trials.base_loss(during_training=True)
        return stops_at_quarter(is_higher, behind, gain, 0.0 if base is None else base - quarter)
    if challenger_half is None:
        return False
    return stops_at_half(is_higher, challenger_half - half, gain, challenger_quarter - challenger_half - gain)


def stops_at_quarter(is_higher: bool, behind: float, gain: float, learned: float = 0.0) -> bool:
    """The first row of the table above; `learned` is 0 where the base is unknown."""
    is_settled = not (is_higher and UNSETTLED * learned < behind < learned)
    return is_settled and behind > PATIENCE * max(gain, 0.0) and (is_higher or gain > 0)


def stops_at_half(is_higher: bool, behind: float, gain: float, closing: float = 0.0) -> bool:
    """The second row of the table above."""
    if is_higher:
        return behind > max(PATIENCE * gain, closing, 0.0)
    return behind > 0 and gain > 0


def _are_neighbours(space: Space, learning_rate: float, other: float) -> bool:
    return abs(space.learning_rates.index(learning_rate) - space.learning_rates.index(other)) == 1


def _to_half(space: Space, trials: Trials, rank: int, learning_rate: float) -> Arm:
    """The arm that resumes a training at a quarter and stops at half."""
    return _resumed(trials, early_arm(space, rank, learning_rate, QUARTER), early_step(space, HALF))


def _resumed(trials: Trials, stopped: Arm, stop_at: int | None = None) -> Arm:
    """The arm that resumes a stopped one and runs to `stop_at`, or to its end."""
    before = trials.finished(stopped)
    assert before is not None
    return stopped.model_copy(update={"stop_at": stop_at, "continue_from": before.trial_id})


def _finish(space: Space, trials: Trials, rank: int, learning_rate: float) -> Requests:
    """The rest of a training that stopped early."""
    half = _to_half(space, trials, rank, learning_rate)
    if half not in trials.outcomes:
        yield [_resumed(trials, early_arm(space, rank, learning_rate, QUARTER))]
    elif trials.finished(half) is not None:
        yield [_resumed(trials, half)]


def find_learning_rate_cost(space: Space) -> float:
    """Expected trainings: three learning rates to a quarter, two or three of them to half, one or two to the end."""
    return 2.0 if len(space.learning_rates) >= 3 else float(len(space.learning_rates))


def min_trainings(space: Space) -> float:
    """One rank's learning rate in the most expensive case of early stopping, and one training of another rank."""
    count = len(space.learning_rates)
    return 1.0 + (count if count < 3 else count * QUARTER + 2 * (1 - QUARTER) + (HALF - QUARTER))
