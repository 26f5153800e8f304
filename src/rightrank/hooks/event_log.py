"""Events of a running selection for other programs: a JSON log and a progress file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from rightrank.data.files import write_text
from rightrank.hooks.progress import Progress
from rightrank.schema.events import Preparing, RunEvent, RunStarted, StepDone
from rightrank.schema.trials import TrialOutcome

PROGRESS_FILE = "progress.json"
PROGRESS_SECONDS = 2.0  # between writes of the progress file
LONG_FIELDS = {
    "item_losses",
    "item_tokens",
    "item_correct",
    "item_scores",
    "item_weights",
    "item_metrics",
}  # in the journal, not in the log


class JsonLog:
    """A view that writes every event as one JSON object a line. It writes steps at most once a second."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last_step = 0.0

    def __enter__(self) -> JsonLog:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def plan(self, started: RunStarted, arms: int, steps: int) -> None:
        self._write("plan", {"expected_trials": arms, "steps": steps, "data": started.data.model_dump(mode="json")})

    def cost(self, trainings: float) -> None:
        self._write("cost", {"expected_trainings": trainings})

    def cost_limit(self, trainings: float) -> None:
        self._write("cost_limit", {"trainings_at_most": trainings})

    def time(self, seconds: float) -> None:
        self._write("time", {"expected_seconds": seconds})

    def resume(self, outcomes: Sequence[TrialOutcome]) -> None:
        self._write("resumed", {"trials_ended": len(outcomes)})

    def event(self, event: RunEvent) -> None:
        if isinstance(event, StepDone | Preparing):
            if time.monotonic() - self._last_step < 1 and not _is_last(event):
                return
            self._last_step = time.monotonic()
        excluded: Any = dict.fromkeys(LONG_FIELDS | {"type", "schema_version"}, True)
        excluded["points"] = {"__all__": {"item_scores"}}
        self._write(event_name(event), event.model_dump(mode="json", exclude=excluded))

    def notice(self, text: str) -> None:
        self._write("notice", {"text": text})

    def _write(self, name: str, values: dict[str, Any]) -> None:
        line = {"event": name, "at": datetime.now(UTC).isoformat(timespec="milliseconds"), **values}
        self._stream.write(json.dumps(line, ensure_ascii=True, allow_nan=False) + "\n")
        self._stream.flush()


class ProgressFile:
    """`progress.json` in a run folder while a selection runs: what `status` and `watch` read from another terminal."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / PROGRESS_FILE
        self._progress = Progress()
        self._written = 0.0

    def plan(self, started: RunStarted, arms: int, steps: int) -> None:
        self._progress.plan(started, arms, steps)

    def cost(self, trainings: float) -> None:
        self._progress.expect(trainings)

    def cost_limit(self, trainings: float) -> None:
        self._progress.limit(trainings)

    def time(self, seconds: float) -> None:
        self._progress.expect_seconds(seconds)

    def resume(self, outcomes: Sequence[TrialOutcome]) -> None:
        self._progress.resume(outcomes)

    def event(self, event: RunEvent) -> None:
        ended = self._progress.event(event) is not None
        if ended or time.monotonic() - self._written > PROGRESS_SECONDS:
            self._written = time.monotonic()
            self._write()

    def remove(self) -> None:
        with suppress(OSError):  # the run folder may not exist, or may have become read-only
            self._path.unlink()

    def _write(self) -> None:
        values = {
            "pid": os.getpid(),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "progress": self._progress.progress_line(),
            "remaining_seconds": self._progress.remaining_seconds(),
        }
        if self._path.parent.is_dir():
            write_text(self._path, json.dumps(values) + "\n", flush=False)


def event_name(event: RunEvent) -> str:
    """`trial_finished`, `step_done`, …"""
    if isinstance(event, StepDone):
        return "step_done"
    return "preparing" if isinstance(event, Preparing) else event.type


def _is_last(event: StepDone | Preparing) -> bool:
    if isinstance(event, StepDone):
        return event.step == event.steps
    return event.items == event.of_items
