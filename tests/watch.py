"""A hook that is made of functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rightrank.hooks import Hook
from rightrank.schema.events import Event, Notice


class Watch(Hook):
    """Calls the functions that are given: `notice` with each line for a person, `on_event` with everything else."""

    def __init__(
        self,
        on_event: Callable[[Any], object] = lambda _: None,
        notice: Callable[[str], object] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._on_event, self._notice, self._should_stop = on_event, notice, should_stop

    def on_event(self, event: Event) -> None:
        if isinstance(event, Notice):
            self._notice(event.text)
        else:
            self._on_event(event)

    def should_stop(self) -> bool:
        return self._should_stop()
