"""What to train next. A strategy is a pure function of the outcomes so far; each lives in a file of its own.

`STRATEGIES` names them all; `make_strategy` answers an unknown name with the names there are.
"""

from __future__ import annotations

from collections.abc import Callable

from rightrank.errors import SettingsError, did_you_mean
from rightrank.settings import SelectSettings
from rightrank.strategies.grid import Grid
from rightrank.strategies.protocol import History, Strategy

__all__ = ["STRATEGIES", "Grid", "History", "Strategy", "make_strategy"]

STRATEGIES: dict[str, Callable[[SelectSettings, int], Strategy]] = {"grid": Grid}


def make_strategy(settings: SelectSettings, steps: int) -> Strategy:
    """The strategy that `settings.strategy` names, for trainings of `steps` optimizer steps.

    Raises:
        SettingsError: an unknown name.
    """
    factory = STRATEGIES.get(settings.strategy)
    if factory is None:
        near = did_you_mean(settings.strategy, STRATEGIES)
        raise SettingsError(f"unknown strategy {settings.strategy!r}{near}; there are: {', '.join(STRATEGIES)}")
    return factory(settings, steps)
