"""The `bracket` strategy: finds the learning rate and the adapter at the top rank, and then whatever the goal needs in addition.

For the deployment rank, the top adapter is truncated to every lower rank, which costs only evaluations; `adapters.find_smallest` judges the
candidates. Neither additional steps after a truncation nor a cut during the training gives a smaller adapter within the margin
(benchmarks/README.md, archive).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from itertools import chain, product

from rightrank.decision.adapter import ReferenceComparison
from rightrank.decision.comparison import is_within, walk_down
from rightrank.decision.evidence import Evidence
from rightrank.decision.run import score_trials
from rightrank.decision.seeds import NOISE
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.settings import LONGER_TRAININGS
from rightrank.schema.trials import Arm, TrialFinished
from rightrank.search.learning_rates import (
    QUARTER,
    can_stop_early,
    estimate_search_cost,
    find_learning_rate,
    train_seeds,
    try_rank,
)
from rightrank.search.protocol import (
    CostEstimate,
    Requests,
    Space,
    Strategy,
    Trials,
    choose_adapter,
    make_truncation_arm,
)

DECAY = 0.57  # median exponent c of L(r) = a + b·r^-c over 26 published curves (quartiles 0.38 to 0.64)
# Of the truncation that the walk starts at. By its mean alone the walk starts lower, for .2 trainings more on long real grids
# (benchmarks/README.md, archive).
START_PROBABILITY = 0.999
STAGES = 2  # of one training at most: a quarter, and the end
NEIGHBOURS = (
    3  # learning rates at most that a lower rank tries: the best one of the nearest rank, and those on either side
)


class Bracket(Strategy):
    """Finds the learning rate and the deployment rank at the top rank; then a second adapter, or the training rank.

    With goal "best-adapter", the top rank is also trained for twice the steps, and the better training is truncated: on eight locked
    grids this gains ten times as much as a second rank does (benchmarks/learning_rate/README.md).

    For the training rank, it trains downward from the smallest truncation that would probably be within the margin with another seed,
    until a rank fails, and then adds seeds. If adapters cannot be truncated (a table of finished runs), a training at a quarter of the
    top rank shows where to start.
    """

    name = "bracket"

    def script(self, trials: Trials) -> Requests:
        space = self.space
        learning_rate = yield from find_learning_rate(trials, space.top)
        if learning_rate is None:
            return
        yield from find_deployment_rank(trials, learning_rate)
        if space.goal != "training-rank":
            return
        start = _find_smallest_likely_truncation(trials, learning_rate)
        if start is None:
            second = max((rank for rank in space.ranks if rank <= space.top / 4), default=space.ranks[0])
            yield from try_rank(trials, second)
            start = _predict_rank(trials, second)
        elif start == space.top:
            start = space.get_lower_rank(start) or start
        yield from walk(trials, start)
        for _ in range(2):
            yield from train_adjacent_ranks(trials)
            yield from confirm(trials)

    def estimate_unbounded_cost(self) -> CostEstimate:
        space, num_truncations = self.space, _count_truncations(self.space)
        search, search_at_most = estimate_search_cost(space)
        num_rates, num_ranks = len(space.learning_rates), len(space.ranks)
        if space.goal != "training-rank":
            more_trainings = LONGER_TRAININGS if space.goal == "best-adapter" else 0
            expected, at_most = search + more_trainings, search_at_most + more_trainings
            arms = 1 + STAGES * math.ceil(at_most) + num_truncations + bool(more_trainings) * (1 + num_truncations)
            return CostEstimate(expected, at_most, search, expected, arms)
        is_staged = can_stop_early(space)
        tried_rates, more_seeds = min(num_rates, NEIGHBOURS), len(space.seeds) - 1
        per_rank = 1.0 + (tried_rates - 1) * QUARTER * is_staged  # expected at a lower rank
        num_cells = tried_rates * (num_ranks - 1) + more_seeds * num_rates * num_ranks
        at_most = search_at_most + num_cells * (1.0 + QUARTER * is_staged)
        expected = search + per_rank * min(2.0, num_ranks - 1.0) + 3.0 * per_rank * more_seeds
        arms = 1 + STAGES * math.ceil(at_most) + num_truncations
        return CostEstimate(min(expected, at_most), at_most, search, search + 1.0, arms)


def _find_smallest_likely_truncation(trials: Trials, learning_rate: float) -> int | None:
    """Return the result of the walk down over the truncations of the top rank; None if none has a result.

    A training at a rank usually ends worse than the truncation to it, so a truncation must be within the margin with high probability.
    """
    space = trials.space
    parent = trials.get_training(space.top, learning_rate)
    if parent is None:
        return None
    arms = [make_truncation_arm(parent, rank) for rank in space.ranks[:-1]]
    truncations = [outcome for arm in arms if (outcome := trials.get_finished(arm)) is not None]
    if not truncations:
        return None
    evidence = Evidence(trials.build_table([parent, *truncations]), NOISE)
    margin = evidence.convert_margin(space.criterion.margin)
    if evidence.lacks_uncertainty:
        return evidence.pick_by_values(margin)
    return walk_down(
        evidence.contenders,
        space.top,
        lambda rank: (evidence.compute_probability(rank, margin) or 0.0) >= START_PROBABILITY,
    )


def _predict_rank(trials: Trials, second: int) -> int:
    """Return the smallest rank r with b·(r^-c - R^-c) within the margin; R is the top rank, and b follows from R and `second`."""
    space = trials.space
    drop = trials.compute_best_loss(second) - trials.compute_best_loss(space.top)
    coefficient = max(drop, 0.0) / (second**-DECAY - space.top**-DECAY)
    if not math.isfinite(coefficient):  # the second rank gave no result
        return space.get_higher_rank(second) or space.top
    return next(
        rank for rank in space.ranks if is_within(coefficient * (rank**-DECAY - space.top**-DECAY), trials.margin)
    )


class Grid(Strategy):
    """Trains the full grid: seed by seed, from the extreme ranks inward, so that both ends of the curve are measured early.

    The deployment rank is found from the top rank at its best learning rate once the grid is complete.
    """

    name = "grid"

    def script(self, trials: Trials) -> Requests:
        space = self.space
        outside_in = dict.fromkeys(chain.from_iterable(zip(reversed(space.ranks), space.ranks, strict=True)))
        cells = product(space.seeds, space.learning_rates, outside_in)
        yield [space.make_arm(rank, learning_rate, seed) for seed, learning_rate, rank in cells]
        learning_rate = min(space.learning_rates, key=lambda lr: (trials.get_training_loss(space.top, lr), lr))
        yield from find_deployment_rank(trials, learning_rate)

    def estimate_unbounded_cost(self) -> CostEstimate:
        cells, num_truncations = self._count_cells(), _count_truncations(self.space)
        longer = LONGER_TRAININGS if self.space.goal == "best-adapter" else 0
        arms = 1 + cells + num_truncations + bool(longer) * (1 + num_truncations)
        return CostEstimate(cells + longer, cells + longer, cells, 2.0, arms)


def find_deployment_rank(trials: Trials, learning_rate: float) -> Requests:
    """Truncate the top rank and store the answer in `trials.adapter`; with goal "best-adapter", also that of a longer training if it is better."""
    space = trials.space
    parent = trials.get_training(space.top, learning_rate)
    if parent is None or not space.can_truncate:
        return
    trials.adapter = yield from _truncate_training(trials, parent)
    if space.goal != "best-adapter":
        return
    long_arm = space.make_arm(space.top, learning_rate).model_copy(update={"steps": LONGER_TRAININGS * space.steps})
    yield [long_arm]
    long_training = trials.get_finished(long_arm)
    if long_training is None:
        return
    adapters = score_trials([parent, long_training], space.criterion)
    reference_comparison = ReferenceComparison(adapters[parent.trial_id], adapters, space.criterion)
    compared = reference_comparison.build_candidate(adapters[long_training.trial_id])
    low, high = compared.difference_low, compared.difference_high
    bounds = "" if low is None or high is None else f" (95% bounds {low:+.2g} and {high:+.2g})"
    result = (
        f"With {long_arm.steps} instead of {space.steps} steps, rank {space.top} is "
        f"{'better' if compared.difference < 0 else 'worse'} by {abs(compared.difference):.2g}{bounds}."
    )
    answer = (yield from _truncate_training(trials, long_training)) if compared.difference < 0 else None
    if answer is None:
        trials.notes.append(f"{result} The adapter of {space.steps} steps is handed over.")
    else:
        trials.adapter = answer.model_copy(update={"notes": [result, *answer.notes]})


def _truncate_training(trials: Trials, parent: TrialFinished) -> Generator[Sequence[Arm], None, AdapterAnswer | None]:
    """Request the truncations of a training at the top rank, and choose the smallest adapter within the margin."""
    ranks = [*trials.space.truncated_ranks, *([0] if trials.space.trains_other_modules else [])]
    yield [make_truncation_arm(parent, rank) for rank in ranks]
    compared = [
        outcome for arm, outcome in trials.outcomes.items() if parent.trial_id == arm.truncate_from or arm.rank == 0
    ]
    return choose_adapter([parent, *compared], trials.space.criterion, parent.trial_id)


def _count_truncations(space: Space) -> int:
    return len(space.truncated_ranks) + space.trains_other_modules if space.can_truncate else 0


def walk(trials: Trials, start: int) -> Requests:
    """Train from `start` upward until a rank holds; if `start` itself holds, downward until a rank fails."""
    space = trials.space
    for rank in [rank for rank in space.ranks if start <= rank < space.top]:
        yield from try_rank(trials, rank)
        if trials.is_within_margin(rank):
            break
    lower = space.get_lower_rank(start)
    while lower is not None and trials.is_within_margin(space.get_higher_rank(lower) or space.top):
        yield from try_rank(trials, lower)
        lower = space.get_lower_rank(lower)


def train_adjacent_ranks(trials: Trials) -> Requests:
    """Train the ranks that may change the answer.

    These are the next lower rank below the answer; and, if the top rank is worse than the best one by more than the
    margin, the ranks above the best one until they get worse.
    """
    space = trials.space
    for _ in range(2 * len(space.ranks)):
        chosen, best = trials.find_smallest_rank(), trials.find_reference()
        if chosen is None or best is None:
            return
        is_top_worse = space.top in trials.list_ranks() and not trials.is_within_margin(space.top)
        candidates = [space.get_higher_rank(best) if is_top_worse else None, space.get_lower_rank(chosen)]
        requested_ranks = {arm.rank for arm in trials.outcomes if arm.truncate_from is None}  # whatever the outcome
        missing = [rank for rank in candidates if rank is not None and rank not in requested_ranks]
        if not missing:
            return
        yield from try_rank(trials, missing[0])


def confirm(trials: Trials) -> Requests:
    """Train additional seeds of the ranks that decide the answer, until the answer stays the same.

    These are the chosen rank, the next lower one, the reference, and the best rank above the reference, which may turn out
    better with more seeds. Each seed can correct the learning rate (`train_seeds`).
    """
    space = trials.space
    for _ in range(len(space.ranks)):
        chosen, reference = trials.find_smallest_rank(), trials.find_reference()
        if chosen is None or reference is None or len(space.seeds) < 2:
            return
        lower = max((rank for rank in trials.list_ranks() if rank < chosen), default=chosen)
        above = [rank for rank in trials.list_ranks() if rank > reference]
        rival = min(above, key=lambda rank: (trials.compute_best_loss(rank), rank), default=reference)
        for rank in dict.fromkeys((chosen, lower, reference, rival)):
            yield from train_seeds(trials, rank)
        if trials.find_smallest_rank() == chosen and trials.find_reference() == reference:
            return
