"""Strategies decide what to train next. A strategy is a pure function of the outcomes so far (`protocol`).

To add one, write it in a file of this folder and name it in `STRATEGIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from rightrank.decision.adapter import MAX_DIRECT_RANK
from rightrank.decision.comparison import is_within
from rightrank.decision.run import Records, is_token_loss
from rightrank.schema.decision import AdapterAnswer, TrainingRankEstimate
from rightrank.schema.errors import SettingsError, did_you_mean
from rightrank.schema.settings import SelectSettings, stored_settings
from rightrank.search.bracket import Bracket, Grid
from rightrank.search.history import Space, space_of
from rightrank.search.protocol import Strategy
from rightrank.search.upward import Upward

STRATEGIES: dict[str, Callable[[Space], Strategy]] = {
    "bracket": Bracket,
    "grid": Grid,
    "upward": Upward,
}


def make_strategy(
    settings: SelectSettings, steps: int, token_loss: bool = True, unseen_steps: int = 0, truncates: bool = True
) -> Strategy:
    """The strategy that `settings.strategy` names, for trainings of `steps` optimizer steps; see `space_of`.

    Raises:
        SettingsError: an unknown name, or a budget too small to compare two ranks.
    """
    space = space_of(settings, steps, token_loss, unseen_steps)
    return strategy_in(settings.strategy, replace(space, truncates=truncates))


def strategy_in(name: str, space: Space) -> Strategy:
    """The strategy of that name in a space.

    Raises:
        SettingsError: an unknown name, or a budget too small to compare two ranks.
    """
    strategy = strategy_named(name)(space)
    least = strategy.min_trainings()
    if space.budget_steps is not None and space.budget_steps < least * space.steps:
        raise SettingsError(
            f"a budget of {space.budget_steps / space.steps:.3g} trainings is too small: {name!r} with "
            f"{len(space.learning_rates)} learning rates needs {least:g} to compare two ranks; give budget_trainings {least:g} "
            f"(budget_steps {math.ceil(least * space.steps)}), fewer learning rates, or a smaller max_steps"
        )
    return strategy


def strategy_named(name: str) -> Callable[[Space], Strategy]:
    """The class of the strategy of that name.

    Raises:
        SettingsError: an unknown name.
    """
    factory = STRATEGIES.get(name)
    if factory is None:
        near = did_you_mean(name, STRATEGIES)
        raise SettingsError(f"unknown strategy {name!r}{near}; there are: {', '.join(STRATEGIES)}")
    return factory


def training_rank_estimate(records: Records) -> TrainingRankEstimate | None:
    """Estimate the training rank from the plain truncations of the top adapter; None without an answer to the first question.

    Above rank 4 a training loses more than a truncation to the same rank, at lower ranks it may lose less. So the
    smallest truncation that loses at most the margin is near the lower end of where the training rank lies.
    """
    answer = records.adapters[-1].answer if records.adapters else None
    if answer is None or records.started.data.form == "own":
        return None
    low, high = probable_ranks(answer)
    where = f"{low}" if low == high else f"{low} to {high}"
    ranks = _settings(records).ranks
    compared = ranks if len(ranks) > 1 else tuple(sorted({low, high, answer.trained_rank} | {max(1, low // 2)}))
    steps = max((trial.steps for trial in records.finished() if trial.arm.is_direct), default=1) or 1
    settings = _settings(records).model_copy(update={"ranks": compared})
    cost = make_strategy(settings, steps, token_loss=is_token_loss(records)).cost()
    trainings = round(cost.expected - cost.to_adapter, 2)
    noun = "training" if trainings == 1 else "trainings"
    takes = f"about {trainings:.2g} more {noun}" if trainings else "no further training"
    further = "" if compared == ranks else f" --ranks {','.join(map(str, compared))}"
    sentence = (
        f"An estimate, not evidence: the rank to train at probably is {where}, since the smallest truncation that loses at "
        f"most the margin has rank {_smallest_holding_truncation(answer)}. To show it takes {takes}: run the same command with "
        f"--goal training-rank{further}."
    )
    return TrainingRankEstimate(low=low, high=high, trainings=trainings, sentence=sentence)


def probable_ranks(answer: AdapterAnswer) -> tuple[int, int]:
    """Where the training rank probably lies, lowest and highest, by the smallest truncation that holds."""
    holding = _smallest_holding_truncation(answer)
    return holding if holding > MAX_DIRECT_RANK else max(1, holding // 2), min(answer.trained_rank, 2 * holding)


def _smallest_holding_truncation(answer: AdapterAnswer) -> int:
    """The smallest plain truncation within the margin of the top as trained, from the top downward; else the top's rank."""
    top = next((one for one in answer.candidates if one.trial_id == answer.trained_id), None)
    found = answer.trained_rank
    truncated = [one for one in answer.candidates if one.how == "truncated"]
    for one in sorted(truncated, key=lambda one: -one.rank):
        if not is_within(one.difference - (0.0 if top is None else top.difference), answer.margin):
            break
        found = one.rank
    return found


def _settings(records: Records) -> SelectSettings:
    """The settings of the run, for the training rank and without a budget."""
    unlimited = dict.fromkeys(("budget_trainings", "budget_steps", "budget_hours"))
    return stored_settings({**records.started.settings, **unlimited, "goal": "training-rank"})
