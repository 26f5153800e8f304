"""Callbacks of a running selection: the one interface between whoever runs trials and whoever watches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rightrank.records.run import RunEvent, RunStarted
from rightrank.records.trials import TrialOutcome


@dataclass(frozen=True, slots=True)
class Observer:
    """Callbacks of a running selection; each one that is left out does nothing.

    All callbacks run on the thread that calls `select_rank`, so a slow one slows the selection down. An exception
    that a callback raises ends the selection; what has finished stays in the journal.

    Example::

        select_rank(model, data, "run", watching=Observer(notice=print, should_stop=lambda: time.time() > deadline))
    """

    on_event: Callable[[RunEvent], None] = lambda _: None
    """Receives each step, each trial that starts and each trial that ends."""

    on_plan: Callable[[RunStarted, int, int], None] = lambda _started, _arms, _steps: None
    """Receives the run's start, the expected number of arms and the steps of each, once before the first trial."""

    on_resume: Callable[[Sequence[TrialOutcome]], None] = lambda _: None
    """Receives the outcomes of the trials that ended before this process started, if there are any."""

    notice: Callable[[str], None] = lambda _: None
    """Receives one line for a person."""

    should_stop: Callable[[], bool] = lambda: False
    """Is asked after each step; on True every running trial writes a checkpoint and `InterruptedRun` is raised."""

    on_cost: Callable[[float], None] = lambda _: None
    """Receives the expected cost in whole trainings, once before the first trial."""

    on_time: Callable[[float], None] = lambda _: None
    """Receives the expected seconds, once before the first trial, where they are known by then."""

    on_cost_limit: Callable[[float], None] = lambda _: None
    """Receives the largest cost in whole trainings that the strategy can have, once before the first trial."""
