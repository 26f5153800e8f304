"""The learning-rate search at one rank: train every learning rate to a quarter of the training, and finish the best one.

Early losses favour learning rates that are too low, because a high one pays off only after it is annealed (Wu et al. 2018, arXiv 1803.02021).
So the learning rates are ranked by the loss of the mean of the factors over the last quarter of the steps taken, which does what annealing
does (Hägele et al. 2024, arXiv 2405.18392). Where examples repeat, the best evaluation of the finished training, the mean of its factors
included, is handed over (`checkpoint`). The rule was locked before it was judged (benchmarks/early_rates/README.md).

If trainings cannot stop early, as those of custom trainers, every learning rate is trained in full and the last loss decides.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from rightrank.schema.trials import Arm, TrialDiverged, TrialFinished
from rightrank.search.protocol import Requests, Space, Trials, orient_value

QUARTER = 0.25  # of a training
MIN_QUARTER_STEPS = 2  # The first step of a warm-up has learning rate 0, so after it all learning rates are equal.
# In margins, from 44 grids: a learning rate at which the top rank is worse by more than .9 never helped a lower rank.
MAX_DEFICIT_AT_TOP = 2.0


def find_learning_rate(
    trials: Trials, rank: int, learning_rates: Sequence[float] | None = None, seed: int | None = None
) -> Generator[Sequence[Arm], None, float | None]:
    """Find the best learning rate at `rank`, and train it in full.

    Args:
        learning_rates: The learning rates to compare; None for all of the space.
        seed: The seed of the trainings; None for the first one.

    Returns:
        The learning rate; None if no training finished.
    """
    space = trials.space
    rates = list(learning_rates or space.learning_rates)
    if can_stop_early(space) and len(rates) > 1:
        quarter_arms = [make_quarter_arm(space, rank, rate, seed) for rate in rates]
        yield quarter_arms
        quarters = [outcome for arm in quarter_arms if (outcome := trials.get_finished(arm)) is not None]
        quarters.sort(key=lambda quarter: (_get_quarter_loss(quarter, space), quarter.learning_rate))
        ordered_rates = [quarter.learning_rate for quarter in quarters]
        while ordered_rates:
            arm = _complete_arm(trials, rank, ordered_rates[0], space.seeds[0] if seed is None else seed)
            yield [arm]
            if trials.get_finished(arm) is not None:
                return arm.learning_rate
            # it diverged, so not a higher one
            ordered_rates = [rate for rate in ordered_rates if rate < ordered_rates[0]]
        if any(isinstance(trials.outcomes.get(arm), TrialFinished | TrialDiverged) for arm in quarter_arms):
            return None
    arms = [space.make_arm(rank, rate, seed) for rate in rates]
    yield arms
    finished = [outcome for arm in arms if (outcome := trials.get_finished(arm)) is not None]
    best = min(finished, key=lambda outcome: (orient_value(outcome, space), outcome.learning_rate), default=None)
    return None if best is None else best.learning_rate


def try_rank(trials: Trials, rank: int) -> Requests:
    """Train `rank` at the best learning rate of the nearest rank; search its two neighbours as well if the rank is not within the margin."""
    space = trials.space
    trained_ranks = [trained for trained in trials.list_ranks() if trained != rank]
    nearest = min(trained_ranks, key=lambda trained: max(trained / rank, rank / trained), default=rank)
    learning_rate = trials.find_best_learning_rate(nearest) or space.learning_rates[0]
    yield [make_quarter_arm(space, rank, learning_rate)] if can_stop_early(space) else []
    yield [_complete_arm(trials, rank, learning_rate, space.seeds[0])]
    if trials.is_within_margin(rank):
        return
    rates = list_neighbours(space, learning_rate)
    if can_stop_early(space):
        yield from find_learning_rate(trials, rank, rates)
        return
    best_loss = trials.get_training_loss(space.top, trials.find_best_learning_rate(space.top) or learning_rate)
    limit = best_loss + MAX_DEFICIT_AT_TOP * trials.margin
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
            rate = yield from find_learning_rate(trials, rank, list_neighbours(space, learning_rate), seed)
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
    return 1.0 + QUARTER * (count - 1.0), count


def can_stop_early(space: Space) -> bool:
    """Return whether trainings can stop at a quarter, and there are learning rates to compare."""
    has_quarter = round(QUARTER * space.steps) >= MIN_QUARTER_STEPS
    return space.can_stop_early and len(space.learning_rates) > 1 and has_quarter


def make_quarter_arm(space: Space, rank: int, learning_rate: float, seed: int | None = None) -> Arm:
    """Return the arm of a training that stops after a quarter of its steps."""
    stop_at = max(1, round(QUARTER * space.steps))
    return space.make_arm(rank, learning_rate, seed).model_copy(update={"stop_at": stop_at})


def _get_quarter_loss(outcome: TrialFinished, space: Space) -> float:
    """Return the held-out loss of the mean of the factors, whatever the metric; the value with lower as better if a table has no loss."""
    return outcome.use_mean_losses().metrics.get("loss", orient_value(outcome, space))


def _complete_arm(trials: Trials, rank: int, learning_rate: float, seed: int) -> Arm:
    """Return the arm of a full training, which resumes from its quarter if there is one."""
    full_arm = trials.space.make_arm(rank, learning_rate, seed)
    at_quarter = trials.get_finished(make_quarter_arm(trials.space, rank, learning_rate, seed))
    return full_arm if at_quarter is None else full_arm.model_copy(update={"continue_from": at_quarter.trial_id})


def list_neighbours(space: Space, learning_rate: float) -> list[float]:
    """Return the learning rate with the next lower and the next higher one."""
    rates = sorted({*space.learning_rates, learning_rate})
    index = rates.index(learning_rate)
    return rates[max(0, index - 1) : index + 2]
