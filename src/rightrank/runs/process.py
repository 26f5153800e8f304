"""Watching and stopping a running selection from other programs: signals, a JSON log and a progress file."""

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

from rightrank.data.files import write_text
from rightrank.report.progress import Progress
from rightrank.runs.folder import PROGRESS_FILE
from rightrank.runs.hook import Hook
from rightrank.schema.errors import TerminatedRun
from rightrank.schema.events import DurationEstimated, EvaluationProgress, Event, Notice, SelectionPlanned, StepDone
from rightrank.schema.trials import OUTCOMES, Record, TrialEvaluated, TrialStarted

PROGRESS_SECONDS = 2.0  # between writes of the progress file
LOGGED_EVENTS = (Notice, TrialStarted, TrialEvaluated, *OUTCOMES)


class JsonLog(Hook):
    """Writes every event as one JSON object per line, and steps at most once per second."""

    is_required = False

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last_step = 0.0

    def on_event(self, event: Event) -> None:
        match event:
            case SelectionPlanned():
                data = event.started.data.model_dump(mode="json")
                self._write("plan", expected_trials=event.expected_trials, steps=event.steps, data=data)
                self._write("cost", expected_trainings=event.expected_trainings)
                self._write("cost_limit", trainings_at_most=event.trainings_at_most)
                if event.outcomes:
                    self._write("resumed", trials_ended=len(event.outcomes))
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


GRACE_SECONDS = 20.0  # Kubernetes waits 30 s and Slurm 30 s by default between SIGTERM and SIGKILL


class SignalHandler(Hook):
    """Handles signals within a `with` block. The first one stops the run after its step, the second at once.

    The end of the grace period after a SIGTERM also stops at once; the steps since the last checkpoint are lost.
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
            self._handlers |= {signal.SIGTERM: self._terminate, signal.SIGALRM: self._stop_now}
        self._previous_handlers: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> SignalHandler:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and (self._owns_process or signal.getsignal(signal.SIGINT) is signal.default_int_handler):
            self._previous_handlers = {
                number: signal.signal(number, handler) for number, handler in self._handlers.items()
            }
        return self

    def __exit__(self, *_error: object) -> None:
        if self.terminated:
            signal.setitimer(signal.ITIMER_REAL, 0)
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
            self._stop_now(_signal, _frame)
        self.requested = self.terminated = True
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        self._notify(f"received SIGTERM: stopping after this step, or in {GRACE_SECONDS:.0f} s at once")

    def _stop_now(self, _signal: int, _frame: FrameType | None) -> None:
        raise TerminatedRun("stopped in the middle of a step; the run resumes from the last checkpoint")
