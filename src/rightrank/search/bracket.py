"""`bracket`: the adapter first, from one training at the top rank; then the rank to train at, from there downward.

The first question as moves: the smallest adapter that one training at the top rank gives.

The top adapter is truncated to every lower rank, which costs evaluations only; `decision.adapter` judges the candidates. Neither further
steps after a truncation nor a cut inside the training gives a smaller adapter within the margin (docs/explanation/science.md, archive).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from itertools import product

from rightrank.decision.adapter import adapter_answer
from rightrank.decision.comparison import is_within, walk_down
from rightrank.schema.trials import Arm, TrialFinished
from rightrank.search.history import Requests, Space, Trials, is_likely_within
from rightrank.search.learning_rates import ANNEAL, find_learning_rate, find_learning_rate_cost, try_rank
from rightrank.search.protocol import CostEstimate, Strategy

DECAY = 0.57  # median exponent c of L(r) = a + b·r^-c over 26 published curves (quartiles 0.38 to 0.64)
# Of the truncation that the walk starts at. By its mean alone the walk starts lower, for .2 trainings more on long real grids
# (docs/explanation/science.md, archive).
START_PROBABILITY = 0.999
STAGES = 5  # of one training at most: a look, two stages, the end, and an annealed copy


class Bracket(Strategy):
    """Find the learning rate at the top rank and answer the first question from that training. For the second question, train
    downward from the smallest truncation that a further seed would find within the margin, until a rank fails, then add seeds.

    Where adapters can't be truncated (a table of finished runs), a training at a quarter of the top rank shows where to start.
    """

    name = "bracket"

    def script(self, trials: Trials) -> Requests:
        space = self.space
        learning_rate = yield from find_learning_rate(trials, space.top)
        if learning_rate is None:
            return
        yield from _answer_adapter_question(trials, learning_rate)
        if space.goal == "adapter":
            return
        start = yield from self.start(trials, learning_rate)
        yield from walk(trials, start, learning_rate)
        yield from settle(trials)
        yield from confirm(trials)
        yield from settle(trials)
        yield from confirm(trials)

    def start(self, trials: Trials, learning_rate: float) -> Generator[Sequence[Arm], None, int]:
        """The rank at which the walk down begins."""
        space = self.space
        start = _smallest_likely_truncation(trials, learning_rate)
        if start is None:
            second = max((rank for rank in space.ranks if rank <= space.top / 4), default=space.ranks[0])
            yield from try_rank(trials, second, learning_rate)
            return _predicted_rank(trials, second)
        return (space.below(start) or start) if start == space.top else start

    def unbounded_cost(self) -> CostEstimate:
        space = self.space
        search, search_at_most, least = find_learning_rate_cost(space)
        # All learning rates at the top, three at every other rank, and every further seed.
        tried = min(len(space.learning_rates), 3)
        others = tried * (1 + 2 * ANNEAL) * (len(space.ranks) - 1)
        trainings = search_at_most + others + (len(space.seeds) - 1) * tried * len(space.ranks)
        arms = 1 + STAGES * math.ceil(trainings) + _truncations(space)
        if space.goal == "adapter":
            return CostEstimate(search, search_at_most, search, least - 1.0, arms)
        expected = search + min(2.0, len(space.ranks) - 1.0) + 3.0 * (len(space.seeds) - 1)
        return CostEstimate(expected, trainings, search, least, arms)


def _smallest_likely_truncation(trials: Trials, learning_rate: float) -> int | None:
    """The result of the walk down over the plain truncations of the top rank; None where none has a result.

    A training at a rank mostly ends worse than the truncation to it. So a truncation must be within the margin with some certainty.
    """
    space = trials.space
    parent = trials.whole(space.top, learning_rate)
    if parent is None:
        return None
    known = {
        arm.rank: outcome
        for arm in trials.outcomes
        if arm.truncate_from == parent.trial_id and arm.rank in space.ranks
        if (outcome := trials.finished(arm)) is not None
    }
    if not known:
        return None
    margin = space.margin_at(trials.best_loss(space.top))
    enough = {
        rank for rank, outcome in known.items() if is_likely_within((outcome, parent), space, margin, START_PROBABILITY)
    }
    return walk_down(known, space.top, enough.__contains__)


def _predicted_rank(trials: Trials, second: int) -> int:
    """The smallest rank r with b·(r^-c - R^-c) within the margin; R is the top rank, and b follows from R and `second`."""
    space = trials.space
    drop = trials.best_loss(second) - trials.best_loss(space.top)
    b = max(drop, 0.0) / (second**-DECAY - space.top**-DECAY)
    margin = space.margin_at(trials.best_loss(space.top))
    if not math.isfinite(b):  # the second rank gave no result
        return space.above(second) or space.top
    return next(rank for rank in space.ranks if is_within(b * (rank**-DECAY - space.top**-DECAY), margin))


class Grid(Strategy):
    """The exhaustive grid: seed by seed, from the extreme ranks inward, so that both ends of the curve are known early.

    The first question is answered from the top rank at its best learning rate, once the grid is complete.
    """

    name = "grid"

    def script(self, trials: Trials) -> Requests:
        space = self.space
        cells = product(space.seeds, space.learning_rates, outside_in(space.ranks))
        yield [space.arm(rank, learning_rate, seed) for seed, learning_rate, rank in cells]
        learning_rate = min(space.learning_rates, key=lambda lr: (trials.whole_loss(space.top, lr), lr))
        yield from _answer_adapter_question(trials, learning_rate)

    def unbounded_cost(self) -> CostEstimate:
        cells = self._cells()
        return CostEstimate(cells, cells, cells, 2.0, 1 + cells + _truncations(self.space))


def outside_in(ranks: Sequence[int]) -> list[int]:
    """Highest, lowest, second highest, second lowest, …"""
    left = sorted(ranks)
    order: list[int] = []
    while left:
        order.append(left.pop(-1 if len(order) % 2 == 0 else 0))
    return order


def _answer_adapter_question(trials: Trials, learning_rate: float) -> Requests:
    """Ask for the candidates of the first question and keep its answer in `trials.adapter`."""
    space = trials.space
    parent = trials.whole(space.top, learning_rate)
    if parent is None or not space.truncates:
        return
    yield [truncation(parent, rank) for rank in space.truncated_ranks]
    own = [outcome for arm, outcome in trials.outcomes.items() if arm.truncate_from == parent.trial_id]
    trials.adapter = adapter_answer([parent, *own], space.criterion, parent.trial_id)


def _truncations(space: Space) -> int:
    return len(space.truncated_ranks) if space.truncates else 0


def truncation(parent: TrialFinished, rank: int) -> Arm:
    """The adapter of `parent` truncated to `rank`."""
    changed = {"rank": rank, "steps": 0, "truncate_from": parent.trial_id, "continue_from": None}
    return parent.arm.model_copy(update=changed)


# The moves: walk to the lowest rank that holds, confirm the result.


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
    best = None if nearest is None else trials.best_learning_rate(nearest)
    return otherwise if best is None else best


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
        asked = {arm.rank for arm in trials.outcomes if arm.truncate_from is None}  # whatever the outcome
        rank = next((rank for rank in (above, below) if rank is not None and rank not in asked), None)
        if rank is None:
            return
        yield from try_rank(trials, rank, _nearest_learning_rate(trials, rank, space.learning_rates[0]))


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
