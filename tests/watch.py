"""What a test waits for: events through a hook that is made of functions, or a state that comes about, however busy the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rightrank.runs.run import Hook
from rightrank.schema.events import Event, Notice

GENEROUS_SECONDS = 600.0  # of every wait in a test: it ends a test that hangs, and never one on a busy machine


def wait_until(condition: Callable[[], object], description: str) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + GENEROUS_SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited {GENEROUS_SECONDS:g} s until {description}"
        time.sleep(0.05)


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
