"""From views to one observer: the command line and `select_rank(progress=True)` watch a selection in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rightrank.report.faults import VIEW_FAULTS, described
from rightrank.schema.events import Observer, RunEvent, RunStarted
from rightrank.schema.trials import TrialOutcome


class View(Protocol):
    """Something that shows or records a running selection."""

    def plan(self, started: RunStarted, arms: int, steps: int) -> None: ...

    def cost(self, trainings: float) -> None: ...

    def cost_limit(self, trainings: float) -> None: ...

    def time(self, seconds: float) -> None: ...

    def resume(self, outcomes: Sequence[TrialOutcome]) -> None: ...

    def event(self, event: RunEvent) -> None: ...


def observer_of(views: Sequence[View], notice: Callable[[str], None], should_stop: Callable[[], bool]) -> Observer:
    """The observer that passes everything on to every view. A view with a fault is left out from then on, with a notice."""
    views = [view if isinstance(view, _Watched) else _Guarded(view, notice) for view in views]

    def on_event(event: RunEvent) -> None:
        for view in views:
            view.event(event)

    def on_plan(started: RunStarted, arms: int, steps: int) -> None:
        for view in views:
            view.plan(started, arms, steps)

    def on_cost(trainings: float) -> None:
        for view in views:
            view.cost(trainings)

    def on_cost_limit(trainings: float) -> None:
        for view in views:
            view.cost_limit(trainings)

    def on_time(seconds: float) -> None:
        for view in views:
            view.time(seconds)

    def on_resume(outcomes: Sequence[TrialOutcome]) -> None:
        for view in views:
            view.resume(outcomes)

    return Observer(
        on_event=on_event,
        on_plan=on_plan,
        on_cost=on_cost,
        on_cost_limit=on_cost_limit,
        on_time=on_time,
        on_resume=on_resume,
        notice=notice,
        should_stop=should_stop,
    )


class _Watched:
    """A user's observer as a view."""

    def __init__(self, observer: Observer) -> None:
        self.plan = observer.on_plan
        self.cost = observer.on_cost
        self.cost_limit = observer.on_cost_limit
        self.time = observer.on_time
        self.resume = observer.on_resume
        self.event = observer.on_event


class _Guarded:
    """A view of our own, which can't end a run: after its first fault it receives nothing more."""

    def __init__(self, view: View, notice: Callable[[str], None]) -> None:
        self._view: View | None = view
        self._notice = notice

    def plan(self, started: RunStarted, arms: int, steps: int) -> None:
        self._pass(lambda view: view.plan(started, arms, steps))

    def cost(self, trainings: float) -> None:
        self._pass(lambda view: view.cost(trainings))

    def cost_limit(self, trainings: float) -> None:
        self._pass(lambda view: view.cost_limit(trainings))

    def time(self, seconds: float) -> None:
        self._pass(lambda view: view.time(seconds))

    def resume(self, outcomes: Sequence[TrialOutcome]) -> None:
        self._pass(lambda view: view.resume(outcomes))

    def event(self, event: RunEvent) -> None:
        self._pass(lambda view: view.event(event))

    def _pass(self, show: Callable[[View], None]) -> None:
        if self._view is None:
            return
        try:
            show(self._view)
        except VIEW_FAULTS as error:
            self._view = None
            self._notice(f"no more progress is shown: it failed ({described(error)}); the run continues")


@contextmanager
def shown(observer: Observer, progress: bool) -> Iterator[Observer]:
    """The observer, with the progress on stderr or in the notebook's cell where that is asked for."""
    if not progress:
        yield observer
        return
    from rich.console import Console

    from rightrank.hooks.terminal import make_view

    with make_view(Console(stderr=True), quiet=False) as view:

        def notice(text: str) -> None:
            view.notice(text)
            observer.notice(text)

        yield observer_of([view, _Watched(observer)], notice, observer.should_stop)
