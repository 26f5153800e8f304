"""The search for the learning rate of one rank, for about two fifths of a training beside the winner's own.

Every learning rate that is tried is trained to an eighth of the full schedule (a *look*) and measured. Then two compare so:

    ==============================================  =====================================================
    the worse one is behind by                      then
    ==============================================  =====================================================
    more than CLOSE of all that the better one has  the better one wins
    learned since the base (CLOSE_ABOVE, where it
    is the higher one)
    less                                            both are copied with their optimizer state and annealed:
                                                    a linear decay to 0 over ANNEAL of the steps. The lower loss
                                                    wins, and the copies are thrown away
    ==============================================  =====================================================

The climb starts at the upper middle and ends at a learning rate that beats both its neighbors, since the loss has one
valley over the logarithm of the learning rate. Only the winner is trained on. If its loss rises between two stages, as it does
when few examples are memorized, the next lower learning rate is brought to the same step, and the better one continues. So is
the next higher one while the winner is no better than the base: in a short training, an eighth may be too early to learn.

Where a table has no look at an eighth, a look at a quarter replaces it; where it has no annealed copies, two close
learning rates are both trained whole. Where trainings can't stop early, every training is whole.

A further rank starts from the learning rate that was found (`try_rank`).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from rightrank.decision.comparison import is_within
from rightrank.schema.trials import Arm, TrialFinished
from rightrank.search.history import Requests, Space, Trials, make_base_arm, orient_value

Choice = Generator[Sequence[Arm], None, float | None]

QUARTER, HALF = 0.25, 0.5  # parts of a training after which learning rates are compared
LOOK = 0.125  # of a training; earlier looks name a wrong learning rate
ANNEAL = 0.05  # of a training
CLOSE = 0.1  # of what the better learning rate has learned since the base
CLOSE_ABOVE = 0.5  # the same for a higher learning rate, whose weights oscillate and look worse than they will end
STAGES = (QUARTER, HALF)  # where the winner is checked for a loss that rises
# A climb upward that gains more than this share of the loss is checked downward. On 16 published grids a higher learning
# rate gained at most .026 where training worked, and .08 where the higher one was too high to train.
MAX_PLAUSIBLE_GAIN = 0.05
# Both in margins, from 44 grids: a neighbouring learning rate made up for at most 1.5 of a rank's excess, and one at which
# the top rank is worse by more than .9 never helped a lower rank.
MAX_RECOVERABLE_EXCESS = 2.0
MAX_DEFICIT_AT_TOP = 2.0


def find_learning_rate(trials: Trials, rank: int) -> Choice:
    """Find the best learning rate at `rank`, with a full training; return None if no training finished."""
    space = trials.space
    if not _can_look(space):
        yield from _climb(trials, rank)
        return trials.find_best_learning_rate(rank)
    for part in (LOOK, QUARTER):
        winner = yield from _climb_looks(trials, rank, part)
        if winner is not None:
            yield from _finish(trials, rank, winner, part)
        if winner is not None or any(
            trials.has_diverged(_early_arm(space, rank, lr, part)) for lr in space.learning_rates
        ):
            break
    if trials.find_best_learning_rate(rank) is None:  # no looks here, or the winner diverged later
        yield from _climb(trials, rank)
    return trials.find_best_learning_rate(rank)


def _climb_looks(trials: Trials, rank: int, part: float) -> Choice:
    """Find the best learning rate after a fraction of the training; None if trainings cannot stop there or all of them diverged."""
    space = trials.space
    learning_rates = space.learning_rates
    best = start = len(learning_rates) // 2
    first = _early_arm(space, rank, learning_rates[start], part)
    yield [first]
    if trials.get_finished(first) is None and not trials.has_diverged(first):
        return None
    for direction in (1, -1):
        place = start + direction
        while 0 <= place < len(learning_rates) and not (direction == 1 and trials.has_diverged(first)):
            yield [_early_arm(space, rank, learning_rates[place], part)]
            pair = (learning_rates[best], learning_rates[place])
            winner = yield from _compare(trials, rank, pair, part)
            if winner != pair[1] and trials.get_finished(_early_arm(space, rank, pair[0], part)):
                break
            best = place
            place += direction
        if best != start and not _is_worse_than_base(trials, _early_arm(space, rank, learning_rates[best], part)):
            break
    return learning_rates[best] if trials.get_finished(_early_arm(space, rank, learning_rates[best], part)) else None


def _compare(trials: Trials, rank: int, pair: tuple[float, float], part: float) -> Choice:
    """Return the better of two learning rates after a fraction of the training. One without a result loses."""
    space = trials.space
    looks = {lr: _early_arm(space, rank, lr, part) for lr in pair}
    scores = {lr: loss for lr, look in looks.items() if (loss := _look_loss(trials, look)) is not None}
    if len(scores) < 2:
        return next(iter(scores), None)
    better, worse = sorted(pair, key=lambda lr: (scores[lr], lr))
    base = _look_loss(trials, make_base_arm(space.lora_alpha))
    close = CLOSE if worse < better else CLOSE_ABOVE
    if base is not None and scores[worse] - scores[better] > close * (base - scores[better]):
        return better
    copies = {lr: _annealed(trials, look) for lr, look in looks.items()}
    yield list(copies.values())
    annealed = {lr: loss for lr, copy in copies.items() if (loss := _look_loss(trials, copy)) is not None}
    if len(annealed) == 2:
        return min(pair, key=lambda lr: (annealed[lr], lr))
    if any(trials.has_diverged(copy) for copy in copies.values()):
        return next(iter(annealed), better)
    for lr in pair:  # no annealed copies here
        if trials.get_training(rank, lr) is None:
            yield [_resumed(trials, looks[lr])]
    return min(pair, key=lambda lr: (trials.get_training_loss(rank, lr), lr))


def _finish(trials: Trials, rank: int, learning_rate: float, part: float) -> Requests:
    """Train the winner from its look to its end.

    Where its loss rises, the next lower learning rate may take its place; where it has learned nothing yet, the next higher.
    """
    space = trials.space
    if trials.get_training(rank, learning_rate) is not None:
        return
    stage = _early_arm(space, rank, learning_rate, part)
    before = _look_loss(trials, stage)
    base = _look_loss(trials, make_base_arm(space.lora_alpha))
    for later in STAGES:
        step = _early_step(space, later)
        if step <= stage.end:
            continue
        following = _resumed(trials, stage, step)
        yield [following]
        loss = _look_loss(trials, following)
        if loss is None or before is None:
            return
        stage = following
        neighbour = None
        if loss > before:
            neighbour = max((lr for lr in space.learning_rates if lr < stage.learning_rate), default=None)
        elif base is not None and loss >= base:
            neighbour = min((lr for lr in space.learning_rates if lr > stage.learning_rate), default=None)
        if neighbour is not None:
            rival = yield from _bring_to(trials, rank, neighbour, step)
            rival_loss = _look_loss(trials, rival)
            if rival_loss is not None and rival_loss < loss:
                stage, loss = rival, rival_loss
        before = loss
    yield [_resumed(trials, stage)]


def _bring_to(trials: Trials, rank: int, learning_rate: float, step: int) -> Generator[Sequence[Arm], None, Arm]:
    """Train to `step` from the latest evaluation at the learning rate, and return the arm."""
    looks = (_early_arm(trials.space, rank, learning_rate, part) for part in (QUARTER, LOOK))
    latest = next((look for look in looks if trials.get_finished(look) is not None and look.end < step), None)
    whole = trials.space.make_arm(rank, learning_rate)
    arm = whole.model_copy(update={"stop_at": step}) if latest is None else _resumed(trials, latest, step)
    yield [arm]
    return arm


def _climb(trials: Trials, rank: int) -> Requests:
    """Climb from the upper middle to a learning rate that is better than both its neighbours.

    The loss has one valley over the logarithm of the learning rate, so the climb ends where a search over all of them would.
    Learning rates that are far too high are an exception: there the loss is flat, and a higher one may look better. A
    doubtful climb upward, and one whose start gave no result, is therefore followed by a climb downward.
    """
    arms = [trials.space.make_arm(rank, learning_rate) for learning_rate in trials.space.learning_rates]
    best = first = len(arms) // 2
    yield [arms[first]]
    if not trials.has_diverged(arms[first]):
        best = yield from _climb_one_way(trials, arms, first, 1)
    if best > first and not _is_doubtful(trials, arms[first], arms[best], is_edge=best == len(arms) - 1):
        return
    yield from _climb_one_way(trials, arms, first, -1)


def _climb_one_way(trials: Trials, arms: Sequence[Arm], best: int, step: int) -> Generator[Sequence[Arm], None, int]:
    """Try one place after the other until the loss rises, and return the best place.

    A place without a result is skipped, except that a divergence ends a climb upward.
    """
    place = best + step
    while 0 <= place < len(arms):
        yield [arms[place]]
        loss, best_loss = trials.get_loss(arms[place]), trials.get_loss(arms[best])
        if loss is not None and (best_loss is None or loss < best_loss):
            best = place
        elif trials.get_finished(arms[place]) is not None or (step > 0 and trials.has_diverged(arms[place])):
            break
        place += step
    return best


def _is_doubtful(trials: Trials, start: Arm, best: Arm, *, is_edge: bool) -> bool:
    """Return whether the winner of a climb upward may be a learning rate that is too high to train.

    This is the case if it is worse than the base. If the base is unknown: if it is the highest of all and gained more than
    `MAX_PLAUSIBLE_GAIN`.
    """
    base = trials.get_loss(make_base_arm(trials.space.lora_alpha))
    before, loss = trials.get_loss(start), trials.get_loss(best)
    if before is None or loss is None:
        return True
    return loss > base if base is not None else is_edge and before - loss > MAX_PLAUSIBLE_GAIN * abs(before)


def try_rank(trials: Trials, rank: int, learning_rate: float) -> Requests:
    """Train `rank` at `learning_rate`, and at neighbouring learning rates until one makes it hold.

    The latter are trained whole only where their look beats that of `learning_rate`.
    """
    yield from _train(trials, rank, learning_rate)
    for neighbour in _promising_neighbours(trials, rank, learning_rate):
        if trials.is_within_margin(rank):
            return
        yield from _challenge(trials, rank, learning_rate, neighbour)


def _train(trials: Trials, rank: int, learning_rate: float) -> Requests:
    """Train `rank` whole with the first seed, with a look on the way that other learning rates can be compared with."""
    space = trials.space
    if trials.get_training(rank, learning_rate) is not None:
        return
    if _can_look(space):
        look = _early_arm(space, rank, learning_rate, LOOK)
        yield [look]
        if trials.get_finished(look) is not None:
            yield [_resumed(trials, look)]
            return
        if trials.has_diverged(look):
            return
    yield [space.make_arm(rank, learning_rate)]


def _challenge(trials: Trials, rank: int, holder: float, challenger: float) -> Requests:
    """Train `rank` at `challenger`, whole only if its look beats that of `holder`."""
    space = trials.space
    looked = (
        part for part in (LOOK, QUARTER) if trials.get_finished(_early_arm(space, rank, holder, part)) is not None
    )
    part = next(looked, None)
    if part is None or not _can_look(space):
        yield [space.make_arm(rank, challenger)]
        return
    look = _early_arm(space, rank, challenger, part)
    yield [look]
    if trials.get_finished(look) is None:
        return
    winner = yield from _compare(trials, rank, (holder, challenger), part)
    if winner == challenger:
        yield [_resumed(trials, look)]


def _promising_neighbours(trials: Trials, rank: int, learning_rate: float) -> Sequence[float]:
    """Return the neighbours of `learning_rate` with which `rank` may be within the margin, the better one at the top rank first.

    If `learning_rate` gave no result, return both. Otherwise return a neighbour at which the top rank is about as good, unless the
    rank fails by far; and the higher neighbour if the rank is undertrained.
    """
    space = trials.space
    place = space.learning_rates.index(learning_rate)
    neighbours = [space.learning_rates[i] for i in (place - 1, place + 1) if 0 <= i < len(space.learning_rates)]
    behind = {lr: _deficit_at_top(trials, lr, learning_rate) for lr in neighbours}
    if rank in trials.list_ranks():
        limit = MAX_DEFICIT_AT_TOP * space.get_margin(trials.compute_best_loss(space.top))
        reference = trials.find_reference()
        fails_by_far = reference is not None and not is_within(
            trials.compute_excess(rank, reference).mean,
            MAX_RECOVERABLE_EXCESS * space.get_margin(trials.compute_best_loss(reference)),
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
    """Return whether more training, rather than a larger rank, may bring the rank within the margin.

    This is the case if the top adapter truncated to this rank is within the margin, and if the rank gained more in the second half
    of its own training than it still lacks.
    """
    space = trials.space
    top = trials.compute_best_loss(space.top)
    truncated = [arm for arm in trials.outcomes if arm.rank == rank and arm.truncate_from]
    known = [loss for loss in map(trials.get_loss, truncated) if loss is not None]
    half = _loss_after(trials, rank, learning_rate, _early_step(space, HALF))
    end = _loss_after(trials, rank, learning_rate, space.steps)
    if not known or half is None or end is None:
        return False
    return is_within(min(known) - top, space.get_margin(top)) and half - end > end - top


def _deficit_at_top(trials: Trials, neighbour: float, learning_rate: float) -> float:
    """Return how much worse the top rank is at `neighbour`, at the latest step that both reached; 0 if unknown."""
    space = trials.space
    for step in (space.steps, *(_early_step(space, part) for part in (HALF, QUARTER, LOOK))):
        losses = [_loss_after(trials, space.top, lr, step) for lr in (neighbour, learning_rate)]
        if losses[0] is not None and losses[1] is not None:
            return losses[0] - losses[1]
    return 0.0


def _lost_at_top(trials: Trials, learning_rate: float) -> bool:
    """Return whether the top rank at this learning rate ended, or was halfway, no better than the base."""
    space, base = trials.space, trials.get_finished(make_base_arm(trials.space.lora_alpha))
    for step in (space.steps, _early_step(space, HALF)):
        loss = _loss_after(trials, space.top, learning_rate, step)
        if loss is not None and base is not None:
            is_loss = step < space.steps and space.points_are_losses
            return loss >= (base.metrics["loss"] if is_loss else orient_value(base, space))
    return False


def _loss_after(trials: Trials, rank: int, learning_rate: float, step: int) -> float | None:
    """Return the value after `step` steps of a training with the first seed, whether it stopped there or not; None if unknown."""
    space = trials.space
    for arm, outcome in trials.outcomes.items():
        if (arm.rank, arm.learning_rate, arm.seed) != (rank, learning_rate, space.seeds[0]):
            continue
        if arm.truncate_from is not None or not isinstance(outcome, TrialFinished):
            continue
        if arm.end == step and outcome.checkpoint_step is None:
            return outcome.metrics["loss"] if space.points_are_losses else orient_value(outcome, space)
        for point in outcome.points:
            if point.step == step:
                return -point.value if space.higher_is_better and not space.points_are_losses else point.value
    return None


def _can_look(space: Space) -> bool:
    """Return whether trainings can stop early, are long enough for an early evaluation, and have learning rates to compare."""
    return space.can_stop_early and len(space.learning_rates) > 1 and space.steps >= 1 / LOOK


def _early_step(space: Space, part: float) -> int:
    """Return the optimizer step at which this fraction of a training is complete, at least 1."""
    return max(1, round(part * space.steps))


def _early_arm(space: Space, rank: int, learning_rate: float, part: float) -> Arm:
    """Return a training that stops after this fraction of its steps."""
    return space.make_arm(rank, learning_rate).model_copy(update={"stop_at": _early_step(space, part)})


def _annealed(trials: Trials, look: Arm) -> Arm:
    """Return the copy of a stopped training that decays to a learning rate of 0 over `ANNEAL` of a training."""
    start = look.stop_at
    assert start is not None
    end = min(trials.space.steps, start + _early_step(trials.space, ANNEAL))
    return _resumed(trials, look, end).model_copy(update={"anneal_from": start})


def _resumed(trials: Trials, stopped: Arm, stop_at: int | None = None) -> Arm:
    """Return the arm that resumes a stopped one and runs to `stop_at`, or to its end."""
    before = trials.get_finished(stopped)
    assert before is not None
    return stopped.model_copy(update={"stop_at": stop_at, "continue_from": before.trial_id})


def _is_worse_than_base(trials: Trials, look: Arm) -> bool:
    """Return whether a stopped training learned nothing.

    Learning rates that are too high to train level off, and a higher one may then have a lower loss.
    """
    base, loss = _look_loss(trials, make_base_arm(trials.space.lora_alpha)), _look_loss(trials, look)
    return base is not None and loss is not None and loss > base


def _look_loss(trials: Trials, look: Arm) -> float | None:
    """Return the held-out loss, whatever the metric, or the value if a table has no loss."""
    outcome = trials.get_finished(look)
    return None if outcome is None else outcome.metrics.get("loss", orient_value(outcome, trials.space))


def find_learning_rate_cost(space: Space) -> tuple[float, float, float]:
    """Return the trainings that the search takes at one rank: expected, at most, and at least to compare two ranks.

    Expected are three early evaluations, two pairs of annealed copies and the rest of the winner. At most are an early evaluation and
    two annealed copies at every learning rate, and a full training of each. The least is the most expensive case of early evaluations
    and copies, and one training of another rank.
    """
    count = len(space.learning_rates)
    if not _can_look(space):
        return float(count), float(count), 1.0 + count
    expected = 1.0 + min(count - 1, 2) * (LOOK + 1.5 * ANNEAL)
    return expected, count * (1.0 + 2 * ANNEAL), 2.0 + (count - 1) * (LOOK + 2 * ANNEAL) + (HALF - LOOK)
