"""The strategies `bracket`, `grid` and `upward`, and the search for the learning rate. A strategy is a pure function of the outcomes so far.

To add a strategy, write its class here and register it in `STRATEGIES`.

The search trains two neighbouring learning rates to a quarter of the training, then the next one on the better side until it gets worse
(`search.rates`), and finishes the best one. Learning rates that the user lists are all trained to a quarter.
Early losses favour learning rates that are too low, because a high one pays off only after it is annealed (Wu et al. 2018, arXiv 1803.02021).
So the learning rates are ranked by the loss of the mean of the factors over the last quarter of the steps taken, which does what annealing
does (Hägele et al. 2024, arXiv 2405.18392). Where examples repeat, the best evaluation of the finished training, the mean of its factors
included, is handed over (`checkpoint`). The rule was locked before it was judged (benchmarks/early_rates/README.md).
If trainings cannot stop early, as those of custom trainers, every learning rate is trained in full and the last loss decides.

For the deployment rank, the top adapter is truncated to every lower rank, which costs only evaluations; `adapters.find_smallest` judges the
candidates. Neither additional steps after a truncation nor a cut during the training gives a smaller adapter within the margin
(benchmarks/README.md, archive).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import chain, product

import numpy as np

from rightrank.decision.adapter import ReferenceComparison
from rightrank.decision.comparison import INTERVAL, is_within, walk_down
from rightrank.decision.evidence import NOISE, Evidence, compute_detectable_difference, compute_needed_seeds
from rightrank.decision.run_answers import find_base, score_trials
from rightrank.schema.errors import SettingsError, suggest_name
from rightrank.schema.results import AdapterAnswer
from rightrank.schema.settings import LONGER_TRAININGS
from rightrank.schema.trials import Arm, TrialDiverged, TrialFinished
from rightrank.search.protocol import (
    TRAININGS_AFTER_SEARCH,
    CostEstimate,
    Requests,
    Space,
    Strategy,
    Trials,
    choose_adapter,
    make_truncation_arm,
    orient_value,
)
from rightrank.search.rates import choose_best_rate, find_next_rate

QUARTER = 0.25  # of a training
MIN_QUARTER_STEPS = 2  # The first step of a warm-up has learning rate 0, so after it all learning rates are equal.
# In margins, from 44 grids: a learning rate at which the top rank is worse by more than .9 never helped a lower rank.
MAX_DEFICIT_AT_TOP = 2.0


def find_learning_rate(
    trials: Trials, rank: int, learning_rates: Sequence[float] | None = None, seed: int | None = None
) -> Generator[Sequence[Arm], None, float | None]:
    """Find the best learning rate at `rank`, and train it in full.

    Args:
        learning_rates: The learning rates to compare; None for those of the space, or its walk.
        seed: The seed of the trainings; None for the first one.

    Returns:
        The learning rate; None if no training finished.
    """
    space = trials.space
    has_begun = False
    if can_stop_early(space):
        losses = dict[float, float]()
        while True:
            yield from visit_rates(
                trials, losses, lambda rate: make_quarter_arm(space, rank, rate, seed), learning_rates
            )
            best = choose_best_rate(losses)
            if math.isinf(losses[best]):
                break
            arm = _complete_arm(trials, rank, best, space.seeds[0] if seed is None else seed)
            yield [arm]
            if trials.get_finished(arm) is not None:
                return best
            _describe_divergence(trials, {best: arm})
            losses |= {rate: math.inf for rate in losses if rate >= best}  # it diverged, so not a higher one
        quarter_arms = [make_quarter_arm(space, rank, rate, seed) for rate in losses]
        has_begun = any(isinstance(trials.outcomes.get(arm), TrialFinished | TrialDiverged) for arm in quarter_arms)
    if has_begun:
        return None
    losses = {}
    yield from visit_rates(trials, losses, lambda rate: space.make_arm(rank, rate, seed), learning_rates)
    best = choose_best_rate(losses)
    return None if math.isinf(losses[best]) else best


def visit_rates(
    trials: Trials,
    losses: dict[float, float],
    make_arm: Callable[[float], Arm],
    learning_rates: Sequence[float] | None = None,
) -> Requests:
    """Train learning rates and add their losses to `losses`, infinite where there is no result.

    These are all of `learning_rates`. If None, they are those of the space or, where it has a start, those of the walk from there, until one
    gets worse on either side or the budget allows no other one.

    Args:
        losses: of the rates visited so far; infinite losses of those that diverged later turn the walk to lower rates.
        make_arm: makes the arm that compares a learning rate.
    """
    space = trials.space
    walks = learning_rates is None and bool(space.start_rates)
    rates: Sequence[float] = [rate for rate in learning_rates or space.first_rates if rate not in losses]
    while True:
        arms = {rate: make_arm(rate) for rate in rates}
        if arms:
            yield list(arms.values())
        losses |= {rate: _get_search_loss(trials, arm) for rate, arm in arms.items()}
        if not walks:
            return
        _describe_divergence(trials, arms)
        next_rate = find_next_rate(losses, space.learning_rates)
        if next_rate is None or len(losses) >= space.max_rates or not trials.affords_rate:
            return
        rates = [next_rate]


def _describe_divergence(trials: Trials, arms: Mapping[float, Arm]) -> None:
    """Note at which learning rates of a walk the training diverged."""
    diverged = [f"{rate:g}" for rate, arm in arms.items() if isinstance(trials.outcomes.get(arm), TrialDiverged)]
    if diverged and trials.space.start_rates:
        trials.notes.append(
            f"At learning rate {' and '.join(diverged)} the training diverged, so the search continues at lower ones."
        )


def try_rank(trials: Trials, rank: int) -> Requests:
    """Train `rank` at the best learning rate of the nearest rank; search its two neighbours as well if the rank is not within the margin."""
    space = trials.space
    trained_ranks = [trained for trained in trials.list_ranks() if trained != rank]
    nearest = min(trained_ranks, key=lambda trained: max(trained / rank, rank / trained))
    learning_rate = trials.contenders[nearest].learning_rate
    yield [make_quarter_arm(space, rank, learning_rate)] if can_stop_early(space) else []
    yield [_complete_arm(trials, rank, learning_rate, space.seeds[0])]
    if trials.is_within_margin(rank):
        return
    rates = list_neighbours(space, learning_rate)
    if can_stop_early(space):
        yield from find_learning_rate(trials, rank, rates)
        return
    best_loss = trials.get_training_loss(space.top, trials.contenders[space.top].learning_rate)
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


def can_stop_early(space: Space) -> bool:
    """Return whether trainings can stop at a quarter, and there are learning rates to compare."""
    has_quarter = round(QUARTER * space.steps) >= MIN_QUARTER_STEPS
    return space.can_stop_early and len(space.learning_rates) > 1 and has_quarter


def make_quarter_arm(space: Space, rank: int, learning_rate: float, seed: int | None = None) -> Arm:
    """Return the arm of a training that stops after a quarter of its steps."""
    stop_at = max(1, round(QUARTER * space.steps))
    return space.make_arm(rank, learning_rate, seed).model_copy(update={"stop_at": stop_at})


def _get_search_loss(trials: Trials, arm: Arm) -> float:
    """Return the loss by which a learning rate is compared; infinite without a result.

    After a quarter, this is the held-out loss of the mean of the factors, whatever the metric. Where a table has no loss, and at the end of a
    training, it is the value with lower as better.
    """
    outcome = trials.get_finished(arm)
    if outcome is None:
        return math.inf
    value = orient_value(outcome, trials.space)
    return value if arm.stop_at is None else outcome.use_mean_losses().metrics.get("loss", value)


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
    grids this gains ten times as much as a second rank does (benchmarks/README.md, archive).

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
        num_rates, num_ranks, is_staged = space.max_rates, len(space.ranks), can_stop_early(space)
        search_at_most = float(num_rates)
        search, least = (
            _count_search_trainings(rates, is_staged) for rates in (space.expected_rates, len(space.first_rates))
        )
        if space.goal != "training-rank":
            more_trainings = TRAININGS_AFTER_SEARCH[space.goal]
            expected, at_most = search + more_trainings, search_at_most + more_trainings
            arms = 1 + STAGES * math.ceil(at_most) + num_truncations + bool(more_trainings) * (1 + num_truncations)
            return CostEstimate(expected, at_most, search, least + more_trainings, arms)
        tried_rates, more_seeds = min(num_rates, NEIGHBOURS), len(space.seeds) - 1
        per_rank = 1.0 + (tried_rates - 1) * QUARTER * is_staged  # expected at a lower rank
        num_cells = tried_rates * (num_ranks - 1) + more_seeds * num_rates * num_ranks
        at_most = search_at_most + num_cells * (1.0 + QUARTER * is_staged)
        expected = search + per_rank * min(2.0, num_ranks - 1.0) + 3.0 * per_rank * more_seeds
        arms = 1 + STAGES * math.ceil(at_most) + num_truncations
        return CostEstimate(min(expected, at_most), at_most, search, least + 1.0, arms)


def _count_search_trainings(num_rates: int, is_staged: bool) -> float:
    """Return the cost of a search over `num_rates` learning rates, in trainings."""
    return 1.0 + QUARTER * (num_rates - 1) if is_staged else float(num_rates)


def _find_smallest_likely_truncation(trials: Trials, learning_rate: float) -> int | None:
    """Return the result of the walk down over the truncations of the top rank; None if none has a result.

    A training at a rank usually ends worse than the truncation to it, so a truncation must be within the margin with high probability.
    """
    space = trials.space
    parent = trials.get_training(space.top, learning_rate)
    if parent is None:
        return None
    arms = [make_truncation_arm(parent, rank) for rank in space.ranks[:-1]]
    truncations = list(filter(None, map(trials.get_finished, arms)))
    if not truncations:
        return None
    evidence = Evidence(trials.build_table([parent, *truncations]), NOISE)
    margin = trials.convert_margin(evidence)
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

    Without a list of learning rates, the grid has those that a walk visits with whole trainings of the largest rank. The deployment rank is found from the top rank at its best learning rate once the grid is complete.
    """

    name = "grid"

    def script(self, trials: Trials) -> Requests:
        space = self.space
        rates: Sequence[float] = space.learning_rates
        if space.start_rates:
            losses = dict[float, float]()
            yield from visit_rates(trials, losses, lambda rate: space.make_arm(space.top, rate))
            rates = sorted(losses)
        outside_in = dict.fromkeys(chain.from_iterable(zip(reversed(space.ranks), space.ranks, strict=True)))
        cells = product(space.seeds, rates, outside_in)
        yield [space.make_arm(rank, learning_rate, seed) for seed, learning_rate, rank in cells]
        learning_rate = min(rates, key=lambda lr: (trials.get_training_loss(space.top, lr), lr))
        yield from find_deployment_rank(trials, learning_rate)

    def estimate_unbounded_cost(self) -> CostEstimate:
        space, most, num_truncations = self.space, self._count_cells(), _count_truncations(self.space)
        cells = most * space.expected_rates // space.max_rates
        longer = LONGER_TRAININGS if space.goal == "best-adapter" else 0
        arms = 1 + most + num_truncations + bool(longer) * (1 + num_truncations)
        minimum = 2.0 + bool(space.start_rates)  # two rates of the largest rank, and another rank
        return CostEstimate(cells + longer, most + longer, cells, minimum, arms)


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
    base = find_base(trials.outcomes.values(), space.criterion, parent.trial_id)
    reference_comparison = ReferenceComparison(adapters[parent.trial_id], adapters, space.criterion, base)
    compared = reference_comparison.build_candidate(adapters[long_training.trial_id])
    low, high = compared.difference_low, compared.difference_high
    bounds = "" if low is None or high is None else f" ({INTERVAL:.0%} interval {low:+.2g} to {high:+.2g})"
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
    while True:
        chosen, best = trials.find_smallest_rank(), trials.find_reference()
        if chosen is None or best is None:
            return
        is_top_worse = not trials.is_within_margin(space.top)
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


NOISE_SEEDS = 3  # seeds of the smallest rank that measure the noise before any other rank is trained


class Upward(Strategy):
    """Trains all learning rates at the smallest rank, measures the seed noise there, and then trains higher ranks until one gains too little.

    In reinforcement learning the values of the first fifth of a run say little about its end. So every training is complete: no learning
    rate is dropped or selected for its early values.
    """

    name = "upward"

    def script(self, trials: Trials) -> Requests:
        start, *higher = self.space.ranks
        visited = dict[float, float]()
        yield from visit_rates(trials, visited, lambda rate: self.space.make_arm(start, rate))
        learning_rate = yield from self._train_seeds(trials, start, self.space.seeds[:NOISE_SEEDS])
        seeds = self._select_seeds(trials, start, learning_rate)
        best_so_far = yield from self._train_seeds(trials, start, seeds)
        for rank in higher:
            rates = sorted(visited) if best_so_far is None else list_neighbours(self.space, best_so_far)
            yield [self.space.make_arm(rank, rate) for rate in rates]
            best = yield from self._train_seeds(trials, rank, seeds)
            best_so_far = best_so_far if best is None else best
            lower_ranks = [lower_rank for lower_rank in trials.list_ranks() if lower_rank < rank]
            if best is not None and lower_ranks and not self.has_gain(trials, rank, lower_ranks):
                return

    def estimate_unbounded_cost(self) -> CostEstimate:
        seeds, learning_rates = len(self.space.seeds), self.space.expected_rates
        expected = learning_rates + min(3, learning_rates) + 2.0 * (seeds - 1)
        maximum = float(self._count_cells())
        expected = min(expected, maximum)
        minimum = len(self.space.first_rates) + 1.0
        return CostEstimate(expected, maximum, expected, minimum, 1 + self._count_cells())

    def _train_seeds(
        self, trials: Trials, rank: int, seeds: Sequence[int]
    ) -> Generator[Sequence[Arm], None, float | None]:
        """Train the seeds at the best learning rate until it stays the best; return it, or None without a result."""
        while True:
            best = trials.find_best_learning_rate(rank)
            if best is None:
                return None
            missing = [arm for seed in seeds if (arm := self.space.make_arm(rank, best, seed)) not in trials.outcomes]
            if not missing:
                return best
            yield missing

    def _select_seeds(self, trials: Trials, rank: int, learning_rate: float | None) -> Sequence[int]:
        """Return as many seeds as the measured noise requires, at most those of the space. A note states the numbers."""
        seeds = self.space.seeds
        trainings = {} if learning_rate is None else trials.get_trials_by_seed(rank, learning_rate)
        values = {orient_value(training, self.space) for training in trainings.values()}
        if len(values) < 2:
            trials.notes.append(
                f"Seed noise: not measured, for rank {rank} has fewer than two different results; give seeds=(0, 1, 2) or more to measure it."
            )
            return seeds
        deviation = float(np.std([orient_value(training, self.space) for training in trainings.values()], ddof=1))
        needed = max(2, compute_needed_seeds(deviation, trials.margin))
        detectable = compute_detectable_difference(deviation, len(seeds[:needed]))
        trials.notes.append(
            f"Seed noise at rank {rank}: a standard deviation of {deviation:.2g} over {len(trainings)} seeds. Detecting a difference of "
            f"{trials.margin:.2g} between two ranks takes about {needed} seeds per rank; {len(seeds[:needed])} of the {len(seeds)} are used, "
            f"which detect differences from about {detectable:.2g}."
        )
        return seeds[:needed]

    def has_gain(self, trials: Trials, rank: int, lower: Sequence[int]) -> bool:
        """Return whether the mean of the rank is better than the best of the lower ranks by more than the margin."""
        best = min(trials.compute_best_loss(lower_rank) for lower_rank in lower)
        return best - trials.compute_best_loss(rank) > trials.margin


STRATEGIES: dict[str, Callable[[Space], Strategy]] = {strategy.name: strategy for strategy in (Bracket, Grid, Upward)}


def make_strategy(name: str, space: Space) -> Strategy:
    """Make the strategy with this name for a space.

    Raises:
        SettingsError: the name is unknown, the strategy does not train the largest rank although an adapter is the goal, or the budget
            is too small.
    """
    factory = STRATEGIES.get(name)
    if factory is None:
        suggestion = suggest_name(name, STRATEGIES)
        raise SettingsError(f"unknown strategy {name!r}{suggestion}; there are: {', '.join(STRATEGIES)}")
    if space.goal != "training-rank" and name == Upward.name:
        raise SettingsError(
            f"goal {space.goal!r} needs an adapter of the largest rank, but strategy {name!r} starts at the smallest rank; give "
            "goal 'training-rank', or another strategy"
        )
    strategy = factory(space)
    minimum = strategy.estimate_cost().minimum
    purpose = " to compare two ranks" if space.goal == "training-rank" else ""
    if space.budget_steps is not None and space.budget_steps < minimum * space.steps:
        raise SettingsError(
            f"a budget of {space.budget_steps / space.steps:.3g} trainings is too small: {name!r} with "
            f"{len(space.first_rates)} learning rates needs {minimum:g}{purpose}; give budget_trainings {minimum:g}, "
            "fewer learning rates, or a smaller max_steps"
        )
    return strategy
