"""The first question as moves: the smallest adapter that one training at the top rank gives.

The top adapter is truncated to every lower rank, which costs evaluations only. Extra steps after truncation gain nothing at
ranks of 8 and above (benchmarks/truncation), where a truncation loses little. So recovery is tried only where the next rank to be won is
4 or less, and only on training examples that no training has seen: on examples that were trained on it makes adapters
worse. The top adapter then gets the same extra steps, and ranks are recovered from the one that the plain truncations name: downward
while they hold, or upward until one holds. `decision.adapter` judges the candidates.
"""

from __future__ import annotations

from rightrank.decision.adapter import Criterion, adapter_answer
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.trials import Arm, TrialFinished
from rightrank.search.history import Trials
from rightrank.search.learning_rates import Requests
from rightrank.search.space import RECOVERY_LR_FACTOR, Space

MAX_RECOVERED_RANK = 4


def answer_adapter_question(trials: Trials, learning_rate: float) -> Requests:
    """Ask for the candidates of the first question and keep its answer in `trials.adapter`."""
    space = trials.space
    parent = trials.direct().get((space.top, learning_rate, space.seeds[0]))
    if parent is None or not space.truncates:
        return
    yield truncations(space, parent)
    plain = current_answer(trials, parent)
    lower = [] if plain is None else [rank for rank in space.truncated_ranks if rank < plain.rank]
    if plain is not None and space.recovery_steps and lower and lower[0] <= MAX_RECOVERED_RANK:
        yield [recovery(space, parent, space.top)]
        yield from _recover(trials, parent, plain)
    trials.adapter = current_answer(trials, parent)


def current_answer(trials: Trials, parent: TrialFinished) -> AdapterAnswer | None:
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
    answer = current_answer(trials, parent)
    return answer is not None and any(one.holds for one in answer.candidates if one.rank == rank)


def adapter_question_cost(space: Space) -> float:
    """Expected trainings: the extra steps of the top and of two or three truncations."""
    return 3.5 * _recovery_part(space)


def max_adapter_arms(space: Space) -> int:
    """An upper bound of the arms: a truncation and a recovery of every rank, and the extra steps of the top."""
    return 2 * len(space.truncated_ranks) + 1 if space.truncates else 0


def max_adapter_cost(space: Space) -> float:
    return max_adapter_arms(space) * _recovery_part(space)


def _recovery_part(space: Space) -> float:
    """One recovery in whole trainings."""
    return space.recovery_steps / space.steps if space.truncates and space.recovery_steps else 0.0
