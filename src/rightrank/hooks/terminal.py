"""A running selection in the terminal: redrawn in place, or as plain lines where the output is no terminal."""

from __future__ import annotations

import time
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from rightrank.hooks.progress import Progress
from rightrank.report.format import quantity
from rightrank.report.terminal import plan_line, terminal_curve
from rightrank.runs.hook import Hook
from rightrank.schema.events import Event, Notice, SelectionPlanned
from rightrank.schema.trials import OUTCOMES

PLAIN_SECONDS = 15.0  # between progress lines


class View(Hook):
    """Shows a running selection, or the evaluations of `compare` and `resize`, as a context manager.

    It prints one line for each finished trial, and a progress line every `PLAIN_SECONDS`; `say` gets lines that come from elsewhere.
    """

    ends_run = False

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._progress = Progress()
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and (curve := self._curve()):
            self.say(curve)

    def on_event(self, event: Event) -> None:
        line = self._progress.event(event)
        match event:
            case Notice():
                self.say(event.text)
            case SelectionPlanned():
                self.say(plan_line(event.started, event.steps))
                if event.outcomes:  # each stage and truncation is one
                    self.say(f"resuming the run: {quantity(len(event.outcomes), 'trial')} ended before")
            case _ if line is not None:
                self.say(line)
        if not isinstance(event, Notice | SelectionPlanned):
            self._redraw()
        if isinstance(event, OUTCOMES):
            self._last_line = time.monotonic()

    def say(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _redraw(self) -> None:
        """Show where the selection is now."""
        if time.monotonic() - self._last_line > PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self.say(self._progress.progress_line())

    def _curve(self) -> str:
        trained, truncated = self._progress.curves()
        return terminal_curve(trained, self._console.width, truncated, label=self._progress.curve_label())


class LiveView(View):
    """Redraws the progress and the curve in place; finished trials scroll by above them."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)
        super().__exit__(*error)

    def say(self, text: str) -> None:
        self._console.print(Text.from_ansi(text), highlight=False)

    def _redraw(self) -> None:
        lines = [Text.from_ansi(self._curve()), Text(self._progress.so_far_line())]
        self._live.update(Group(*lines, Text(self._progress.progress_line(), style="bold")))


def make_view(quiet: bool, console: Console | None = None) -> View:
    """On stderr, or `console`: `LiveView` on a terminal; plain lines in a pipe or a notebook, with `NO_COLOR` or if `quiet`."""
    console = console or Console(stderr=True)
    return LiveView(console) if console.is_terminal and not (quiet or console.no_color) else View(console, quiet)
