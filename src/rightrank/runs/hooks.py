"""Hooks for the terminal, a progress file, signals and the report. A selection knows none of them by name."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rightrank.data.files import write_text
from rightrank.decision.run_answers import decide_if_possible
from rightrank.report.answer import Answers, build_answers
from rightrank.report.figures import write_figures
from rightrank.report.format import format_quantity
from rightrank.report.html import build_figures, render_model_card, render_report
from rightrank.report.progress import Progress, format_plan
from rightrank.runs.folder import PROGRESS_FILE, RunFolder
from rightrank.runs.run import Hook, Run, Selected
from rightrank.schema.errors import TerminatedRun
from rightrank.schema.events import (
    AdapterRecorded,
    EvaluationProgress,
    Event,
    Notice,
    Records,
    RunStopped,
    SelectionPlanned,
    StepDone,
)
from rightrank.schema.results import Decision
from rightrank.schema.trials import OUTCOMES, SCHEMA_VERSION

PLAIN_SECONDS = 15.0  # between progress lines of a view without a terminal
PROGRESS_SECONDS = 2.0  # between writes of the progress file


class View(Hook):
    """Shows a running selection, or the evaluations of `compare` and `resize`, as a context manager.

    It prints one line for each finished trial. On a terminal, progress and curve are redrawn in place below these lines; in a pipe, a
    notebook, with `NO_COLOR` or if `quiet`, a progress line is printed every `PLAIN_SECONDS`.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console = console or Console(stderr=True)
        self._quiet, self._progress = quiet, Progress()
        self._last_line, self._last_text = time.monotonic(), ""
        is_live = console.is_terminal and not (quiet or console.no_color)
        self._live = Live(console=console, refresh_per_second=4, transient=True) if is_live else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._live is not None:
            self._live.stop()

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
            self._show_progress()
        if isinstance(event, OUTCOMES):
            self._last_line = time.monotonic()

    def print_line(self, text: str) -> None:
        if self._live is not None:
            self._console.print(Text.from_ansi(text), highlight=False)
        elif not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=not self._console.is_terminal)

    def _show_progress(self) -> None:
        """Show the current progress: in place on a terminal, else if it differs from what was shown last."""
        text = self._progress.format_progress()
        if self._live is not None:
            self._live.update(Text(text, style="bold"))
        elif text not in ("", self._last_text) and time.monotonic() - self._last_line > PLAIN_SECONDS:
            self._last_line, self._last_text = time.monotonic(), text
            self.print_line(text)


class ProgressFile(Hook):
    """Keeps `progress.json` in a run folder while a selection runs; `status` reads it in another process."""

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
            if self._path.parent.is_dir():
                text = json.dumps({"progress": self._progress.format_progress()})
                write_text(self._path, text + "\n", flush=False)


class SignalHandler(Hook):
    """Handles signals within a `with` block. The first one stops the run after its step, the second at once.

    Outside the main thread, or in a program that handles Ctrl-C itself, nothing changes.

    Args:
        notify: receives a line for a person.
        owns_process: this process only runs the selection, so that SIGTERM is handled too.
    """

    def __init__(self, notify: Callable[[str], None], *, owns_process: bool = False) -> None:
        self.requested = self.terminated = False
        self._notify = notify
        self._owns_process = owns_process
        self._previous_handlers: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> SignalHandler:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and (self._owns_process or signal.getsignal(signal.SIGINT) is signal.default_int_handler):
            for number in (signal.SIGINT, signal.SIGTERM) if self._owns_process else (signal.SIGINT,):
                self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def should_stop(self) -> bool:
        return self.requested

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        is_termination = number == signal.SIGTERM
        if self.requested and is_termination:
            raise TerminatedRun("stopped in the middle of a step; the run resumes from the last checkpoint")
        if self.requested:
            raise KeyboardInterrupt
        self.requested, self.terminated = True, is_termination
        self._notify("stopping after this step; Ctrl-C or SIGTERM stops at once")


MAX_SHARE = 0.05  # the fraction of the wall time for writing the report while trials run


class Report(Hook):
    """Keeps the report, the figures, decision.json and the adapter's card up to date. Each is computed from the records and replaced as a whole."""

    _run: Run
    _next_write = 0.0  # the earliest time of the next report, by the monotonic clock

    def on_start(self, run: Run) -> None:
        self._run = run

    def on_event(self, event: Event) -> None:
        if isinstance(event, AdapterRecorded):
            self._write_views(None)
            self._write_card(None)
        if isinstance(event, RunStopped) or (isinstance(event, OUTCOMES) and time.monotonic() >= self._next_write):
            start = time.monotonic()
            decides_training_rank = self._run.selection.settings.goal == "training-rank"
            self._write_views(decide_if_possible(self._run.records) if decides_training_rank else None)
            # A report of many trials takes longer, so the next one waits in proportion.
            self._next_write = time.monotonic() + (time.monotonic() - start) / MAX_SHARE

    def on_end(self, selected: Selected) -> None:
        self._write_views(selected.answers.decision)
        if selected.adapter is not None:
            self._write_card(selected.answers.decision)

    def _write_views(self, decision: Decision | None) -> None:
        """Write the report and, once a deployment rank or a training rank is known, decision.json."""
        folder, records = self._run.folder, self._run.records
        answers = build_answers(records, decision, self._run.selection.settings.goal)
        if decision is not None or records.adapters:
            document = {"schema_version": SCHEMA_VERSION} | answers.build_document()
            write_text(folder.decision, json.dumps(document, indent=2, allow_nan=False) + "\n")
        write_report(folder, records, answers)

    def _write_card(self, decision: Decision | None) -> None:
        write_text(self._run.folder.adapter / "README.md", render_model_card(self._run.records, decision))


def write_report(folder: RunFolder, records: Records, answers: Answers) -> None:
    """Write the figures and the report of the answers."""
    figures = build_figures(records, answers.decision)
    write_figures(folder.figures, figures)
    exports = folder.path / "exports"
    page = render_report(
        records,
        answers,
        figures,
        run=str(folder.path),
        exports=sorted(path.name for path in exports.iterdir() if path.is_dir()) if exports.is_dir() else (),
    )
    write_text(folder.report, page)
