"""The learning-rate search at one rank: train every learning rate to a quarter of the training, and finish the best one.

On stored grids this rule has less regret than a search that climbs over earlier evaluations, and it is simpler
(`python -m benchmarks.learning_rate.table stored`). Three details:

- If the next lower learning rate is within one standard error of the best one, it is preferred, because losses that are measured early
  favour learning rates that are too high at the end.
- If the best learning rate is the lowest or the highest one, the next one beyond it is trained to a quarter too.
- If the loss rises between a quarter and half, as it does when few examples are memorized, the next lower learning rate is trained to half
  as well, and the better one is finished.

If trainings cannot stop early, as those of custom trainers, every learning rate is trained in full.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from rightrank.decision.learning_rate import extrapolate_rate
from rightrank.schema.trials import Arm, TrialFinished
from rightrank.search.history import (
    HALF,
    QUARTER,
    Requests,
    Space,
    Trials,
    estimate_difference,
    make_base_arm,
    orient_value,
)

LearningRateSearch = Generator[Sequence[Arm], None, float | None]

MIN_QUARTER_STEPS = 2  # The first step of a warm-up has learning rate 0, so after it all learning rates are equal.
# In margins, from 44 grids: a learning rate at which the top rank is worse by more than .9 never helped a lower rank.
MAX_DEFICIT_AT_TOP = 2.0


def find_learning_rate(
    trials: Trials, rank: int, learning_rates: Sequence[float] | None = None, seed: int | None = None
) -> LearningRateSearch:
    """Find the best learning rate at `rank`, and train it in full.

    Args:
        learning_rates: The learning rates to compare, ascending; None for all of the space and, if an edge is best, those beyond it.
        seed: The seed of the trainings; None for the first one.

    Returns:
        The learning rate; None if no training finished.
    """
    space = trials.space
    rates = list(learning_rates or space.learning_rates)
    reserved_steps = 0 if learning_rates else space.reserved_steps
    if can_stop_early(space) and len(rates) > 1:
        yield [make_stopped_arm(space, rank, rate, QUARTER, seed) for rate in rates]
        for _ in range(0 if learning_rates else space.max_added_learning_rates):
            added_rate = _find_rate_beyond_edge(trials, rank, rates, seed)
            if added_rate is None or not trials.can_afford(space.steps + reserved_steps):
                break
            rates = sorted([*rates, added_rate])
            yield [make_stopped_arm(space, rank, added_rate, QUARTER, seed)]
        quarter_arms = [make_stopped_arm(space, rank, rate, QUARTER, seed) for rate in rates]
        ordered_rates = order_learning_rates(trials, quarter_arms)
        while ordered_rates:
            finished_rate = yield from _finish_training(trials, rank, ordered_rates[0], rates, seed, reserved_steps)
            if finished_rate is not None:
                return finished_rate
            ordered_rates = [
                rate for rate in ordered_rates if rate < ordered_rates[0]
            ]  # it diverged, so not a higher one
        if any(trials.get_finished(arm) is not None or trials.has_diverged(arm) for arm in quarter_arms):
            return None
    yield [space.make_arm(rank, rate, seed) for rate in rates]
    losses = {rate: loss for rate in rates if (loss := trials.get_loss(space.make_arm(rank, rate, seed))) is not None}
    return min(losses, key=lambda rate: (losses[rate], rate), default=None)


def order_learning_rates(trials: Trials, stopped_arms: Sequence[Arm]) -> list[float]:
    """Return the learning rates of trainings that stopped at the same step, the one to finish first, without those that have no result.

    They are ordered by loss. If the next lower learning rate is within one standard error of the best one, it comes first.
    """
    outcomes = [outcome for arm in stopped_arms if (outcome := trials.get_finished(arm)) is not None]
    ordered = sorted(outcomes, key=lambda outcome: (get_stopped_loss(outcome, trials.space), outcome.learning_rate))
    if not ordered:
        return []
    best = ordered[0]
    lower = max(
        (outcome for outcome in ordered if outcome.learning_rate < best.learning_rate),
        key=lambda outcome: outcome.learning_rate,
        default=None,
    )
    if lower is not None:
        difference = estimate_difference([(lower, best)], trials.space, "loss")
        if difference is not None and difference.mean <= difference.standard_error:
            ordered.remove(lower)
            ordered.insert(0, lower)
    return [outcome.learning_rate for outcome in ordered]


def _find_rate_beyond_edge(trials: Trials, rank: int, rates: Sequence[float], seed: int | None) -> float | None:
    """Return the next learning rate beyond the lowest or highest one if that one is the best and has learned something."""
    space = trials.space
    ordered = order_learning_rates(trials, [make_stopped_arm(space, rank, rate, QUARTER, seed) for rate in rates])
    if not ordered or ordered[0] not in (rates[0], rates[-1]):
        return None
    is_highest = ordered[0] == rates[-1]
    from_edge = rates[::-1] if is_highest else rates
    # The step between the second and the third continues grids that alternate, such as .001, .003, .01.
    inner, outer = from_edge[1:3][::-1] if len(rates) > 2 else from_edge[::-1]
    factor = outer / inner
    if is_highest and not _has_learned(trials, make_stopped_arm(space, rank, ordered[0], QUARTER, seed)):
        return None
    return extrapolate_rate(ordered[0], ordered[0] / factor)


def _has_learned(trials: Trials, stopped_arm: Arm) -> bool:
    """Return whether the loss is lower than that of the base. Learning rates that are too high level off above it."""
    base = trials.get_finished(make_base_arm(trials.space.lora_alpha))
    outcome = trials.get_finished(stopped_arm)
    if base is None or outcome is None:
        return outcome is not None
    return get_stopped_loss(outcome, trials.space) < get_stopped_loss(base, trials.space)


def _finish_training(
    trials: Trials, rank: int, rate: float, rates: Sequence[float], seed: int | None, reserved_steps: int
) -> LearningRateSearch:
    """Resume the training of `rate` from its quarter to its end, or that of the next lower learning rate if the loss rises.

    The next lower one costs a quarter more, which is trained only if the budget then suffices for the end and for `reserved_steps`.

    Returns:
        The learning rate of the finished training; None if it diverged or failed.
    """
    space = trials.space
    if (space.seeds[0] if seed is None else seed) in trials.get_trials_by_seed(rank, rate):
        return rate
    at_quarter = make_stopped_arm(space, rank, rate, QUARTER, seed)
    stopped, at_half = at_quarter, _resume_arm(trials, at_quarter, HALF)
    yield [at_half]
    if trials.has_diverged(at_half):
        return None
    quarter_loss, half_loss = _get_loss(trials, at_quarter), _get_loss(trials, at_half)
    if quarter_loss is not None and half_loss is not None:  # a table may lack the evaluation at half
        stopped = at_half
        if half_loss > quarter_loss and trials.can_afford(space.steps - at_quarter.end + reserved_steps):
            lower_at_half = yield from _train_lower_rate(trials, rank, rate, rates, seed)
            lower_loss = None if lower_at_half is None else _get_loss(trials, lower_at_half)
            if lower_at_half is not None and lower_loss is not None and lower_loss < half_loss:
                stopped = lower_at_half
    end = _resume_arm(trials, stopped)
    yield [end]
    return None if trials.get_finished(end) is None else end.learning_rate


def _train_lower_rate(
    trials: Trials, rank: int, rate: float, rates: Sequence[float], seed: int | None
) -> Generator[Sequence[Arm], None, Arm | None]:
    """Train the next lower learning rate from its quarter to half, and return the arm; None if there is none with a result."""
    lower_rate = max((candidate for candidate in rates if candidate < rate), default=None)
    if lower_rate is None:
        return None
    at_quarter = make_stopped_arm(trials.space, rank, lower_rate, QUARTER, seed)
    if trials.get_finished(at_quarter) is None:
        return None
    at_half = _resume_arm(trials, at_quarter, HALF)
    yield [at_half]
    return at_half


def try_rank(trials: Trials, rank: int, learning_rate: float) -> Requests:
    """Train `rank` at `learning_rate`; search its two neighbours as well if the rank is not within the margin."""
    space = trials.space
    yield [make_stopped_arm(space, rank, learning_rate, QUARTER)] if can_stop_early(space) else []
    yield [_complete_arm(trials, rank, learning_rate, space.seeds[0])]
    if trials.is_within_margin(rank):
        return
    rates = _list_neighbours(space, learning_rate)
    if can_stop_early(space):
        yield from find_learning_rate(trials, rank, rates)
        return
    limit = trials.compute_best_loss(space.top) + MAX_DEFICIT_AT_TOP * space.get_margin(
        trials.compute_best_loss(space.top)
    )
    yield [space.make_arm(rank, rate) for rate in rates if trials.get_training_loss(space.top, rate) <= limit]


def train_seeds(trials: Trials, rank: int) -> Requests:
    """Train `rank` with every seed, so that another seed can correct the learning rate.

    Each seed searches for its learning rate. Every learning rate that a seed chose is trained with every seed, and the best mean decides.
    """
    space = trials.space
    learning_rate = trials.find_best_learning_rate(rank)
    if learning_rate is None:
        return
    chosen_rates = {learning_rate}
    if can_stop_early(space):
        for seed in space.seeds[1:]:
            rate = yield from find_learning_rate(trials, rank, _list_neighbours(space, learning_rate), seed)
            chosen_rates |= set() if rate is None else {rate}
    pairs = [(rate, seed) for rate in sorted(chosen_rates) for seed in space.seeds]
    yield [
        _complete_arm(trials, rank, rate, seed)
        for rate, seed in pairs
        if seed not in trials.get_trials_by_seed(rank, rate)
    ]


def estimate_search_cost(space: Space) -> tuple[float, float]:
    """Estimate the cost of the search at the top rank in trainings, expected and at most."""
    count = float(len(space.learning_rates))
    if not can_stop_early(space):
        return count, count
    return 1.0 + QUARTER * (count - 1.0), count + space.max_added_learning_rates


def can_stop_early(space: Space) -> bool:
    """Return whether trainings can stop at a quarter, and there are learning rates to compare."""
    has_quarter = round(QUARTER * space.steps) >= MIN_QUARTER_STEPS
    return space.can_stop_early and len(space.learning_rates) > 1 and has_quarter


def make_stopped_arm(space: Space, rank: int, learning_rate: float, fraction: float, seed: int | None = None) -> Arm:
    """Return the arm of a training that stops after `fraction` of its steps."""
    stop_at = max(1, round(fraction * space.steps))
    return space.make_arm(rank, learning_rate, seed).model_copy(update={"stop_at": stop_at})


def get_stopped_loss(outcome: TrialFinished, space: Space) -> float:
    """Return the held-out loss, whatever the metric; the value with lower as better if a table has no loss."""
    return outcome.metrics.get("loss", orient_value(outcome, space))


def _get_loss(trials: Trials, arm: Arm) -> float | None:
    outcome = trials.get_finished(arm)
    return None if outcome is None else get_stopped_loss(outcome, trials.space)


def _resume_arm(trials: Trials, stopped_arm: Arm, fraction: float | None = None) -> Arm:
    """Return the arm that resumes a stopped one and runs to `fraction` of the training, or to its end."""
    outcome = trials.get_finished(stopped_arm)
    assert outcome is not None
    stop_at = None if fraction is None else max(stopped_arm.end + 1, round(fraction * trials.space.steps))
    return stopped_arm.model_copy(update={"stop_at": stop_at, "continue_from": outcome.trial_id})


def _complete_arm(trials: Trials, rank: int, learning_rate: float, seed: int) -> Arm:
    """Return the arm of a full training, which resumes from its quarter if there is one."""
    at_quarter = make_stopped_arm(trials.space, rank, learning_rate, QUARTER, seed)
    if trials.get_finished(at_quarter) is None:
        return trials.space.make_arm(rank, learning_rate, seed)
    return _resume_arm(trials, at_quarter)


def _list_neighbours(space: Space, learning_rate: float) -> list[float]:
    """Return the learning rate with the next lower and the next higher one."""
    rates = sorted({*space.learning_rates, learning_rate})
    index = rates.index(learning_rate)
    return rates[max(0, index - 1) : index + 2]
