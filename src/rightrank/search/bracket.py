"""`bracket`: the adapter first, from one training at the top rank; then the rank to train at, from there downward.

The first question as moves: the smallest adapter that one training at the top rank gives.

The top adapter is truncated to every lower rank, which costs evaluations only. Extra steps after truncation gain nothing at
ranks of 8 and above (benchmarks/truncation), where a truncation loses little. So recovery is tried only where the next rank to be won is
4 or less, and only on training examples that no training has seen: on examples that were trained on it makes adapters
worse. The top adapter then gets the same extra steps, and ranks are recovered from the one that the plain truncations name: downward
while they hold, or upward until one holds. `decision.adapter` judges the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from itertools import product

from rightrank.decision.adapter import Criterion, adapter_answer
from rightrank.decision.comparison import is_within, walk_down
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.trials import Arm, TrialFinished
from rightrank.search.history import Trials, excess_of
from rightrank.search.learning_rates import (
    Requests,
    find_learning_rate,
    find_learning_rate_cost,
    max_search_trainings,
    min_trainings,
)
from rightrank.search.moves import confirm, confirmation_cost, max_trainings, settle, support, try_rank, walk
from rightrank.search.protocol import CostEstimate, Strategy
from rightrank.search.space import RECOVERY_LR_FACTOR, Space

DECAY = 0.57  # median exponent c of L(r) = a + b·r^-c over 26 published curves (quartiles 0.38 to 0.64)
STAGES = 5  # of one training at most: a look, two stages, the end, and an annealed copy


class Bracket(Strategy):
    """Find the learning rate at the top rank and answer the first question from that training. For the second question, train
    downward from the smallest truncation that loses at most the margin until a rank fails, then add seeds.

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
        yield from support(trials)
        yield from confirm(trials)
        yield from settle(trials)
        yield from confirm(trials)

    def start(self, trials: Trials, learning_rate: float) -> Generator[Sequence[Arm], None, int]:
        """The rank at which the walk down begins."""
        space = self.space
        start = _smallest_truncation_that_holds(trials, learning_rate)
        if start is None:
            second = space.a_quarter_of_the_top()
            yield from try_rank(trials, second, learning_rate)
            return _predicted_rank(trials, second)
        return (space.below(start) or start) if start == space.top else start

    def unbounded_cost(self) -> CostEstimate:
        space = self.space
        adapter, at_most = _adapter_cost(space)
        to_adapter = find_learning_rate_cost(space) + adapter
        if space.goal == "adapter":
            return CostEstimate(to_adapter, max_search_trainings(space) + at_most, to_adapter)
        expected = to_adapter + min(2.0, len(space.ranks) - 1.0) + confirmation_cost(space)
        return CostEstimate(expected, max_trainings(space) + at_most, to_adapter)

    def min_trainings(self) -> float:
        found = min_trainings(self.space)
        return found - 1.0 if self.space.goal == "adapter" else found

    def max_script_arms(self) -> int:
        return 1 + STAGES * math.ceil(max_trainings(self.space)) + _max_adapter_arms(self.space)


def _smallest_truncation_that_holds(trials: Trials, learning_rate: float) -> int | None:
    """The result of the walk down over the plain truncations of the top rank; None where none has a result."""
    space = trials.space
    parent = trials.direct().get((space.top, learning_rate, space.seeds[0]))
    if parent is None:
        return None
    known = {
        arm.rank: outcome
        for arm in trials.outcomes
        if arm.truncate_from == parent.trial_id and arm.steps == 0 and arm.rank in space.ranks
        if (outcome := trials.finished(arm)) is not None
    }
    if not known:
        return None
    margin = space.margin_at(trials.best_loss(space.top))
    return walk_down(known, space.top, lambda rank: is_within(excess_of([(known[rank], parent)], space).mean, margin))


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
        yield self._arms()
        top = self.space.top
        learning_rate = min(self.space.learning_rates, key=lambda lr: (trials.whole_loss(top, lr), lr))
        yield from _answer_adapter_question(trials, learning_rate)

    def unbounded_cost(self) -> CostEstimate:
        maximum = self._cells() + _adapter_cost(self.space)[1]
        return CostEstimate(maximum, maximum, maximum)

    def max_script_arms(self) -> int:
        return 1 + len(self._arms()) + _max_adapter_arms(self.space)

    def min_trainings(self) -> float:
        return 2.0

    def _arms(self) -> list[Arm]:
        space = self.space
        cells = product(space.seeds, space.learning_rates, outside_in(space.ranks))
        return [space.arm(rank, learning_rate, seed) for seed, learning_rate, rank in cells]


def outside_in(ranks: Sequence[int]) -> list[int]:
    """Highest, lowest, second highest, second lowest, …"""
    left = sorted(ranks)
    order: list[int] = []
    while left:
        order.append(left.pop(-1 if len(order) % 2 == 0 else 0))
    return order


MAX_RECOVERED_RANK = 4


def _answer_adapter_question(trials: Trials, learning_rate: float) -> Requests:
    """Ask for the candidates of the first question and keep its answer in `trials.adapter`."""
    space = trials.space
    parent = trials.direct().get((space.top, learning_rate, space.seeds[0]))
    if parent is None or not space.truncates:
        return
    yield truncations(space, parent)
    plain = _current_answer(trials, parent)
    lower = [] if plain is None else [rank for rank in space.truncated_ranks if rank < plain.rank]
    if plain is not None and space.recovery_steps and lower and lower[0] <= MAX_RECOVERED_RANK:
        yield [recovery(space, parent, space.top)]
        yield from _recover(trials, parent, plain)
    trials.adapter = _current_answer(trials, parent)


def _current_answer(trials: Trials, parent: TrialFinished) -> AdapterAnswer | None:
    """What the candidates of `parent` that have run so far say; None before the first."""
    space = trials.space
    criterion = Criterion(
        space.metric,
        space.higher_is_better,
        space.margin,
        space.kind == "token_loss",
        not space.points_are_losses,
        space.trusts_values,
    )
    own = [outcome for arm, outcome in trials.outcomes.items() if arm.truncate_from == parent.trial_id]
    return adapter_answer([parent, *own], criterion, parent.trial_id)


def truncations(space: Space, parent: TrialFinished) -> list[Arm]:
    """The adapter of `parent` truncated to every lower rank, descending, without recovery."""
    return [
        parent.arm.model_copy(
            update={"rank": rank, "steps": 0, "truncate_from": parent.trial_id, "continue_from": None}
        )
        for rank in space.truncated_ranks
    ]


def recovery(space: Space, parent: TrialFinished, rank: int) -> Arm:
    """The adapter of `parent` truncated to `rank` (its own included), then trained on unseen examples."""
    return parent.arm.model_copy(
        update={
            "rank": rank,
            "steps": space.recovery_steps,
            "learning_rate": parent.learning_rate * RECOVERY_LR_FACTOR,
            "truncate_from": parent.trial_id,
            "continue_from": None,
        }
    )


def _recover(trials: Trials, parent: TrialFinished, plain: AdapterAnswer) -> Requests:
    """Recover from the rank that the plain truncations name: downward while ranks hold, or upward until one does."""
    space = trials.space
    ranks = space.truncated_ranks
    start = ranks.index(plain.rank) if plain.rank in ranks else 0
    for place in range(start, len(ranks)):
        yield [recovery(space, parent, ranks[place])]
        if not _holds(trials, parent, ranks[place]):
            break
    if place > start:
        return
    for rank in reversed(ranks[:start]):
        if _holds(trials, parent, ranks[start]):
            return
        yield [recovery(space, parent, rank)]
        if _holds(trials, parent, rank):
            return


def _holds(trials: Trials, parent: TrialFinished, rank: int) -> bool:
    """Whether any candidate of the rank holds against the reference."""
    answer = _current_answer(trials, parent)
    return answer is not None and any(one.holds for one in answer.candidates if one.rank == rank)


def _max_adapter_arms(space: Space) -> int:
    """An upper bound of the arms: a truncation and a recovery of every rank, and the extra steps of the top."""
    return 2 * len(space.truncated_ranks) + 1 if space.truncates else 0


def _adapter_cost(space: Space) -> tuple[float, float]:
    """Trainings for the first question, expected and at most: the extra steps of the top and of two or three truncations, or of all."""
    part = space.recovery_steps / space.steps if space.truncates and space.recovery_steps else 0.0
    return 3.5 * part, _max_adapter_arms(space) * part
