"""A running selection in the terminal: redrawn in place, or as plain lines if the output is not a terminal."""

from __future__ import annotations

import time
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from rightrank.report.format import format_quantity
from rightrank.report.progress import Progress
from rightrank.report.terminal import format_plan
from rightrank.report.terminal_curve import draw_terminal_curve
from rightrank.runs.hook import Hook
from rightrank.schema.events import Event, Notice, SelectionPlanned
from rightrank.schema.trials import OUTCOMES

PLAIN_SECONDS = 15.0  # between progress lines


class View(Hook):
    """Shows a running selection, or the evaluations of `compare` and `resize`, as a context manager.

    It prints one line for each finished trial, and a progress line every `PLAIN_SECONDS`.
    """

    is_required = False

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._progress = Progress()
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        """Do nothing: plain lines need no end."""

    def on_event(self, event: Event) -> None:
        line = self._progress.record_event(event)
        match event:
            case Notice():
                self.print_line(event.text)
            case SelectionPlanned():
                self.print_line(format_plan(event.started, event.steps))
                if event.outcomes:  # each stage and each truncation is a trial
                    self.print_line(f"resuming the run: {format_quantity(len(event.outcomes), 'trial')} ended earlier")
            case _ if line is not None:
                self.print_line(line)
        if not isinstance(event, Notice | SelectionPlanned):
            self._redraw()
        if isinstance(event, OUTCOMES):
            self._last_line = time.monotonic()

    def print_line(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=not self._console.is_terminal)

    def _redraw(self) -> None:
        """Show the current progress."""
        if time.monotonic() - self._last_line > PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self.print_line(self._progress.format_progress())


class LiveView(View):
    """Redraws the progress and the curve in place; lines of finished trials scroll by above them."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)

    def print_line(self, text: str) -> None:
        self._console.print(Text.from_ansi(text), highlight=False)

    def _redraw(self) -> None:
        lines = [Text.from_ansi(self._format_curve()), Text(self._progress.format_best_rank())]
        self._live.update(Group(*lines, Text(self._progress.format_progress(), style="bold")))

    def _format_curve(self) -> str:
        trained, truncated = self._progress.get_curves()
        label = self._progress.format_curve_label()
        return "\n".join(draw_terminal_curve(trained, self._console.width, truncated, label=label))


def make_view(quiet: bool, console: Console | None = None) -> View:
    """Return a `LiveView` on a terminal, else a `View` with plain lines: in a pipe, a notebook, with `NO_COLOR` or if `quiet`."""
    console = console or Console(stderr=True)
    return LiveView(console) if console.is_terminal and not (quiet or console.no_color) else View(console, quiet)
