"""A running selection in the terminal: live where there is one, plain lines where there is not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from rightrank.records import RunEvent, RunStarted, TrialOutcome
from rightrank.report.format import quantity
from rightrank.report.progress import Progress
from rightrank.report.terminal_figures import terminal_curve

CURVE_WIDTH, CURVE_HEIGHT = 72, 14
PLAIN_SECONDS = 15.0  # between progress lines where nothing can be redrawn


class LiveView:
    """Redraws progress and curve in place; finished trials scroll by above."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress()
        self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)
        curve = self._curve()
        if curve and error is None:
            self._console.print(Text.from_ansi(curve))

    def plan(self, started: RunStarted, arms: int, steps: int) -> None:
        self._progress.plan(started, arms)
        self.notice(plan_line(started, arms, steps))

    def resume(self, outcomes: Sequence[TrialOutcome]) -> None:
        self._progress.resume(outcomes)
        self.notice(resume_line(outcomes))

    def event(self, event: RunEvent) -> None:
        line = self._progress.event(event)
        if line is not None:
            self._console.print(line, highlight=False)
        lines = [Text.from_ansi(self._curve()), Text(self._progress.so_far_line())]
        self._live.update(Group(*lines, Text(self._progress.progress_line(), style="bold")))

    def notice(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def _curve(self) -> str:
        width = min(CURVE_WIDTH, self._console.width)
        return terminal_curve(self._progress.curve(), width, CURVE_HEIGHT, colour=not self._console.no_color)


class PlainView:
    """One line a finished trial, and a progress line now and then."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._progress = Progress()
        self._said = time.monotonic()

    def __enter__(self) -> PlainView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        curve = terminal_curve(self._progress.curve(), CURVE_WIDTH, CURVE_HEIGHT, colour=False)
        if curve and error is None:
            self.notice(curve)

    def plan(self, started: RunStarted, arms: int, steps: int) -> None:
        self._progress.plan(started, arms)
        self.notice(plan_line(started, arms, steps))

    def resume(self, outcomes: Sequence[TrialOutcome]) -> None:
        self._progress.resume(outcomes)
        self.notice(resume_line(outcomes))

    def event(self, event: RunEvent) -> None:
        line = self._progress.event(event)
        if line is None and time.monotonic() - self._said > PLAIN_SECONDS:
            line = self._progress.progress_line()
        if line is not None:
            self._said = time.monotonic()
            self.notice(line)

    def notice(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def make_view(console: Console, quiet: bool) -> LiveView | PlainView:
    """Live on a terminal; plain lines in a pipe, with `NO_COLOR`, or where nothing is to be said."""
    return LiveView(console) if console.is_terminal and not (quiet or console.no_color) else PlainView(console, quiet)


def plan_line(started: RunStarted, arms: int, steps: int) -> str:
    splits = started.data.splits
    counts = ", ".join(f"{summary.items} {name}" for name, summary in splits.items())
    truncated = sum(summary.truncated for summary in splits.values())
    dropped = sum(summary.dropped for summary in splits.values())
    notes = [f"{truncated} cut to the length limit"] * bool(truncated) + [f"{dropped} dropped, no label left"] * bool(
        dropped
    )
    if started.data.unreadable:
        notes.append(f"{started.data.unreadable} rows left out: half characters, which no tokenizer takes")
    if started.data.control_characters:
        notes.append(f"{started.data.control_characters} items with control characters")
    if started.data.duplicates_across_splits:
        notes.append(f"{started.data.duplicates_across_splits} exact duplicates across splits")
    return (
        f"items: {counts}{' (' + '; '.join(notes) + ')' if notes else ''}; form: {started.data.form}; "
        f"about {arms} trials of {steps} steps on {started.environment['device']}"
    )


def resume_line(outcomes: Sequence[TrialOutcome]) -> str:
    return f"going on with a run of which {quantity(len(outcomes), 'trial')} ended already"
