"""Strategies decide what to train next. A strategy is a pure function of the outcomes so far (`protocol`).

To add a strategy, write it in a file of this folder and register it in `STRATEGIES`.
"""

from __future__ import annotations

from collections.abc import Callable

from rightrank.schema.errors import SettingsError, suggest_name
from rightrank.search.bracket import Bracket, Grid
from rightrank.search.protocol import Space, Strategy
from rightrank.search.upward import Upward

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
            f"{len(space.learning_rates)} learning rates needs {minimum:g}{purpose}; give budget_trainings {minimum:g}, "
            "fewer learning rates, or a smaller max_steps"
        )
    return strategy
