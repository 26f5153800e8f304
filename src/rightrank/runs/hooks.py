"""Hooks, which watch a selection and can stop it: the base class, and those for the terminal, a JSON log, a progress file, signals and the
report. The core knows none of them by name.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rightrank.adapters.adapter_folders import CARD_IMAGES
from rightrank.data.files import replace_file, write_text
from rightrank.decision.run_answers import decide_if_possible
from rightrank.report.answer import Answers, build_answers
from rightrank.report.figures import Figure, build_spectrum_figure, write_figures
from rightrank.report.format import format_quantity
from rightrank.report.html import build_figures, render_model_card, render_report
from rightrank.report.progress import Progress, format_plan
from rightrank.runs.folder import PROGRESS_FILE, RunFolder
from rightrank.runs.selection import PreparedSelection, Selected
from rightrank.schema.errors import InputError, RightrankError, RunError, TerminatedRun, describe_error, log_traceback
from rightrank.schema.events import (
    AdapterRecorded,
    AnyJournalRecord,
    DurationEstimated,
    EvaluationProgress,
    Event,
    Listener,
    Notice,
    Records,
    RunContinued,
    RunStarted,
    RunStopped,
    SelectionPlanned,
    StepDone,
)
from rightrank.schema.results import Decision
from rightrank.schema.trials import OUTCOMES, SCHEMA_VERSION, Record, TrialEvaluated, TrialStarted


class Hook(Listener):
    """A base class for objects that watch a selection and can stop it. Every method does nothing by default.

    All methods run on the thread that calls `select_rank`, one hook after the other in the order of `callbacks`. A hook that
    raises an error ends the selection with one line that names the hook. Finished trials are kept, and the same call resumes.

    Example::

        class Deadline(Hook):
            def should_stop(self) -> bool:
                return time.time() > END

        select_rank(model, data, "run", callbacks=[Deadline()])
    """

    is_required = True
    """Whether an error of the hook ends the selection at once. Otherwise the selection continues without the hook, and reports
    the error at the end."""

    def on_start(self, run: Run) -> None:
        """Handle the start, when data and base are loaded and nothing is written yet. An `InputError` refuses the selection.

        `run.selection`, `run.folder` and `run.records` describe the run; hooks read them. `run.on_event` passes an event to all hooks, and to
        the journal if it is a record.
        """

    def on_end(self, selected: Selected) -> None:
        """Handle the end, when the adapter is exported and the decision is in the journal."""


class Hooks(Hook):
    """Several hooks that act as one."""

    def __init__(self, hooks: Sequence[Hook] = ()) -> None:
        self._hooks = list(hooks)
        self._faults: dict[Hook, HookError] = {}

    def on_start(self, run: Run) -> None:
        self._call_each(lambda hook: hook.on_start(run))

    def on_event(self, event: Event) -> None:
        self._call_each(lambda hook: hook.on_event(event))

    def should_stop(self) -> bool:
        requests: list[bool] = []
        self._call_each(lambda hook: requests.append(hook.should_stop()))
        return any(requests)

    def on_end(self, selected: Selected) -> None:
        """Notify every hook.

        Raises:
            HookError: a hook that is not required had failed earlier.
        """
        self._call_each(lambda hook: hook.on_end(selected))
        for fault in self._faults.values():
            raise fault

    def _call_each(self, call: Callable[[Hook], object]) -> None:
        for hook in self._hooks:
            if hook in self._faults:
                continue
            try:
                with _HookErrorWrapper(type(hook).__name__):
                    call(hook)
            except HookError as fault:
                if hook.is_required:
                    raise
                self._faults[hook] = fault


@dataclass(frozen=True, eq=False)
class Run(Listener):
    """A run: the prepared selection, its folder, and the records so far. Events are journaled here and passed to the hooks."""

    selection: PreparedSelection
    folder: RunFolder
    hooks: Hooks
    records: Records
    # The first record, or the settings with which the run continues; None if they are unchanged.
    start_record: RunStarted | RunContinued | None

    def on_event(self, event: Event) -> None:
        """Journal the event if it is a record, and pass it to the hooks."""
        if isinstance(event, AnyJournalRecord):
            self.folder.journal.append(event)
            self.records.add(event)
        self.hooks.on_event(event)

    def should_stop(self) -> bool:
        return self.hooks.should_stop()


class HookError(RunError):
    """A hook failed."""


class _HookErrorWrapper(AbstractContextManager[None]):
    """Reports an error of a hook in one line that names it. Errors that already have such a line pass unchanged."""

    # Not a `contextmanager` function, which would not let a RunError be raised from a StopIteration.

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _at: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, RightrankError | OSError):
            return
        log_traceback(error)
        advice = "finished trials are kept, and the same call resumes"
        raise HookError(f"{self._name} failed ({describe_error(error)}); {advice}") from error


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
        self._last_line, self._last_text = time.monotonic(), ""

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
        """Show the current progress, if it differs from what was shown last."""
        text = self._progress.format_progress()
        if text != self._last_text and time.monotonic() - self._last_line > PLAIN_SECONDS:
            self._last_line, self._last_text = time.monotonic(), text
            self.print_line(text)


class LiveView(View):
    """Redraws the progress in place; lines of finished trials scroll by above it."""

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
        self._live.update(Text(self._progress.format_progress(), style="bold"))


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


MAX_SHARE = 0.05  # the fraction of the wall time for writing the report while trials run


class Report(Hook):
    """Keeps the report, the figures, decision.json and the adapter's card up to date."""

    is_required = False
    _run: Run
    _next_write = 0.0  # the earliest time of the next report, by the monotonic clock

    def on_start(self, run: Run) -> None:
        self._run = run

    def on_event(self, event: Event) -> None:
        if isinstance(event, AdapterRecorded):
            records = self._run.records
            self._write_views(records, None)
            _write_card(self._run.folder, records, None)
        if isinstance(event, RunStopped) or (isinstance(event, OUTCOMES) and time.monotonic() >= self._next_write):
            start, records = time.monotonic(), self._run.records
            decides_training_rank = self._run.selection.settings.goal == "training-rank"
            self._write_views(records, decide_if_possible(records) if decides_training_rank else None)
            end = time.monotonic()  # a report of many trials takes longer, so the next one waits in proportion
            self._next_write = end + (end - start) / MAX_SHARE

    def on_end(self, selected: Selected) -> None:
        self._write_views(self._run.records, selected.decision_or_none)
        if selected.adapter is not None:
            _write_card(self._run.folder, self._run.records, selected.decision_or_none)

    def _write_views(self, records: Records, decision: Decision | None) -> None:
        """Write the report and, once a deployment rank or a training rank is known, decision.json."""
        folder, answers = self._run.folder, build_answers(records, decision, self._run.selection.settings.goal)
        if decision is not None or records.adapters:
            write_text(
                folder.decision,
                json.dumps({"schema_version": SCHEMA_VERSION} | answers.build_document(), indent=2, allow_nan=False)
                + "\n",
            )
        write_report(folder, records, answers)


def _write_card(folder: RunFolder, records: Records, decision: Decision | None) -> None:
    """Write the adapter's card into `adapter/`, with the figures that there are."""
    images = [name for name in CARD_IMAGES if (folder.figures / name).exists()]
    for name in images:
        with replace_file(folder.adapter / name) as temporary:
            shutil.copy2(folder.figures / name, temporary)
    write_text(folder.adapter / "README.md", render_model_card(records, decision, images))


def write_report(folder: RunFolder, records: Records, answers: Answers) -> None:
    """Write the figures and the report of the answers."""
    figures = [*build_figures(records, answers.decision), *_build_spectrum_figures(folder.adapter)]
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


def _build_spectrum_figures(adapter: Path) -> list[Figure]:
    """Build the spectrum of the exported adapter.

    There is no figure before the export, for an adapter that is not in PEFT's format, or where torch is not installed.
    """
    if not (adapter / "adapter_config.json").exists():
        return []
    try:
        from rightrank.adapters.spectra import inspect_adapter
    except ModuleNotFoundError:
        return []
    try:
        figure = build_spectrum_figure(inspect_adapter(adapter))
    except InputError:
        return []
    return [] if figure is None else [figure]
