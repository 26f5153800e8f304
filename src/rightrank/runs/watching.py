"""Hooks that show a running selection and stop it: the terminal, a JSON log, a progress file, and signals."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from rightrank.data.files import write_text
from rightrank.report.format import format_quantity
from rightrank.report.progress import Progress, format_plan
from rightrank.report.terminal_curve import draw_terminal_curve
from rightrank.runs.folder import PROGRESS_FILE
from rightrank.runs.hook import Hook
from rightrank.schema.errors import TerminatedRun
from rightrank.schema.events import DurationEstimated, EvaluationProgress, Event, Notice, SelectionPlanned, StepDone
from rightrank.schema.trials import OUTCOMES, Record, TrialEvaluated, TrialStarted

PLAIN_SECONDS = 15.0  # between progress lines of a view without a terminal
PROGRESS_SECONDS = 2.0  # between writes of the progress file
LOGGED_EVENTS = (Notice, TrialStarted, TrialEvaluated, *OUTCOMES)


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


class JsonLog(Hook):
    """Writes every event as one JSON object per line, and steps at most once per second."""

    is_required = False

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last_step = 0.0

    def on_event(self, event: Event) -> None:
        match event:
            case SelectionPlanned():
                self._write(
                    "plan",
                    expected_trials=event.expected_trials,
                    expected_trainings=event.expected_trainings,
                    trainings_at_most=event.trainings_at_most,
                    steps=event.steps,
                    trials_ended=len(event.outcomes),
                    data=event.started.data.model_dump(mode="json"),
                )
            case DurationEstimated():
                self._write("time", expected_seconds=event.expected_seconds)
            case StepDone() | EvaluationProgress():
                is_last = (
                    event.step == event.steps if isinstance(event, StepDone) else event.examples == event.total_examples
                )
                if is_last or time.monotonic() - self._last_step >= 1:
                    self._last_step = time.monotonic()
                    self._write(event.type, **_dump_logged_fields(event))
            case _ if isinstance(event, LOGGED_EVENTS):
                self._write(event.type, **_dump_logged_fields(event))

    def _write(self, name: str, **values: Any) -> None:
        line = {"event": name, "at": datetime.now(UTC).isoformat(timespec="milliseconds"), **values}
        self._stream.write(json.dumps(line, ensure_ascii=True, allow_nan=False) + "\n")
        self._stream.flush()


def _dump_logged_fields(event: Record) -> dict[str, Any]:
    """Return the fields of an event for the log, without per-example scores, which are in the journal."""
    example_fields = (name for name in type(event).model_fields if name.startswith("example_"))
    excluded: Any = dict.fromkeys(("type", "schema_version", *example_fields), True)
    excluded["points"] = {"__all__": {"example_scores"}}
    return event.model_dump(mode="json", exclude=excluded)


class ProgressFile(Hook):
    """Keeps `progress.json` in a run folder while a selection runs; `status` reads it in another process."""

    is_required = False

    def __init__(self, folder: Path) -> None:
        self._path = folder / PROGRESS_FILE
        self._progress = Progress()
        self._written = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        with suppress(OSError):  # the run folder may not exist, or may have become read-only
            self._path.unlink()

    def on_event(self, event: Event) -> None:
        self._progress.record_event(event)
        ends = isinstance(event, OUTCOMES)
        if ends or (
            isinstance(event, StepDone | EvaluationProgress) and time.monotonic() - self._written > PROGRESS_SECONDS
        ):
            self._written = time.monotonic()
            values = {
                "pid": os.getpid(),
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "progress": self._progress.format_progress(),
                "remaining_seconds": self._progress.estimate_remaining_seconds(),
            }
            if self._path.parent.is_dir():
                write_text(self._path, json.dumps(values) + "\n", flush=False)


class SignalHandler(Hook):
    """Handles signals within a `with` block. The first one stops the run after its step, the second at once.

    Outside the main thread, or in a program that handles Ctrl-C itself, nothing changes.

    Args:
        notify: receives a line for a person.
        owns_process: this process only runs the selection, so that SIGTERM is handled too.
    """

    def __init__(self, notify: Callable[[str], None], *, owns_process: bool = False) -> None:
        self.requested = False
        self.terminated = False
        self._notify = notify
        self._owns_process = owns_process
        self._handlers = {signal.SIGINT: self._interrupt}
        if owns_process:
            self._handlers[signal.SIGTERM] = self._terminate
        self._previous_handlers: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> SignalHandler:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and (self._owns_process or signal.getsignal(signal.SIGINT) is signal.default_int_handler):
            self._previous_handlers = {
                number: signal.signal(number, handler) for number, handler in self._handlers.items()
            }
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def should_stop(self) -> bool:
        return self.requested

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._notify("stopping after this step; Ctrl-C again stops at once")

    def _terminate(self, _signal: int, _frame: FrameType | None) -> None:
        if self.terminated:
            raise TerminatedRun("stopped in the middle of a step; the run resumes from the last checkpoint")
        self.requested = self.terminated = True
        self._notify("received SIGTERM: stopping after this step; another one stops at once")
