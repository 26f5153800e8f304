"""A worker process: it loads its own base, prepares the driver's request, and trains the tasks that it receives.

`python -m rightrank.plugins.cluster.worker` reads commands as lines from stdin and writes messages as lines to stdout. When stdin
ends, the driver is gone, and the worker stops at its next step with checkpoints.
"""

from __future__ import annotations

import os
import platform
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO, TypeAlias

from pydantic import Field, JsonValue, TypeAdapter

from rightrank.schema.errors import InterruptedRun, RightrankError, RunError
from rightrank.schema.events import Evaluating, Event, Listener, Notice, StepDone
from rightrank.schema.trials import Record, Trial, TrialFailed, TrialOutcome, TrialStarted
from rightrank.version import __version__

if TYPE_CHECKING:
    from rightrank.runs.executor import Executor

STEP_SECONDS = 0.5  # between two messages of progress, at least
DISK_SECONDS = 600.0  # for which a worker waits for a disk that is full or fails
DISK_PAUSE = 5.0  # between two attempts
SAME_EVERYWHERE = ("torch", "transformers", "peft")


class Setup(Record):
    """The selection. A worker prepares the same request as the driver and must compute the same fingerprint."""

    type: Literal["setup"] = "setup"
    model: str
    data: str
    settings: dict[str, JsonValue]  # with the ranks that the driver settled
    begun: dict[str, JsonValue] | None = None  # see `Request`
    fingerprint: str
    folder: Path  # the run folder, shared by driver and workers
    working_folder: Path  # relative paths start here


class Task(Record):
    """Trials for one worker, which trains several of them in one pass where that is faster."""

    type: Literal["task"] = "task"
    trials: list[Trial]
    base_loss: float | None


class Stop(Record):
    """Stop the current task at the next step and save checkpoints."""

    type: Literal["stop"] = "stop"


class Ready(Record):
    type: Literal["ready"] = "ready"
    versions: dict[str, str]
    sees_folder: bool  # the driver's run folder


class TaskEnded(Record):
    """The worker is idle: every trial of the task has an outcome, or the worker was stopped."""

    type: Literal["task_ended"] = "task_ended"


class Refused(Record):
    """The worker can't run the selection, and no other worker could; `reason` is for the user."""

    type: Literal["refused"] = "refused"
    reason: str
    exit_status: int


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker ended without being asked to. The driver's own record: no worker sends it."""

    reason: str
    killed: bool = False  # by SIGKILL, as the system does when memory is short
    with_machine: bool = False  # the machine or the network failed, whatever the worker did


Command: TypeAlias = Annotated[Setup | Task | Stop, Field(discriminator="type")]
WorkerMessage: TypeAlias = Annotated[
    Ready | TaskEnded | Refused | Notice | StepDone | Evaluating | TrialStarted | TrialOutcome,
    Field(discriminator="type"),
]
COMMAND: TypeAdapter[Command] = TypeAdapter(Command)
WORKER_MESSAGE: TypeAdapter[WorkerMessage] = TypeAdapter(WorkerMessage)

Send: TypeAlias = Callable[[WorkerMessage], None]


class Worker(Listener):
    """Handles commands and sends messages, whatever carries them: tasks run on the thread that calls `run`."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._setup: Setup | None = None
        self._executor: Executor | None = None
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._scratch = Path(tempfile.mkdtemp(prefix="rightrank-worker-"))
        self._stop = threading.Event()
        self._said = ""  # the last notice about the disk
        self._last_step = 0.0

    def receive(self, line: str | bytes) -> None:
        """Handle a command; may be called from any thread. A `Setup` is answered by `Ready`."""
        command = COMMAND.validate_json(line)
        match command:
            case Setup():
                self._setup = command
                with suppress(OSError):  # no such folder here: then only absolute paths work
                    os.chdir(command.working_folder)
                self._send(Ready(versions=versions(), sees_folder=(command.folder / "journal.jsonl").is_file()))
            case Stop():
                self._stop.set()
            case Task():
                self._stop.clear()
                self._tasks.put(command)

    def follow(self, commands: Iterable[str]) -> None:
        """Handle commands until their stream ends; then `run` stops the current task at its next step, and returns."""
        for line in commands:
            self.receive(line)
        self._tasks.put(None)
        self._stop.set()

    def run(self) -> None:
        try:
            while (task := self._tasks.get()) is not None:
                self.run_task(task)
        finally:
            self.close()

    def close(self) -> None:
        """Remove the worker's files from the local disk."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def run_task(self, task: Task) -> None:
        """Send an outcome for each trial of a task, or `Refused` for an error that no other worker could avoid."""
        assert self._setup is not None
        remaining = {trial.trial_id: trial for trial in task.trials}
        until = time.monotonic() + DISK_SECONDS
        while remaining and not self._stop.is_set():
            try:
                self._executor = self._executor or self.make_executor(self._setup)
                for outcome in self._executor.run(list(remaining.values()), task.base_loss):
                    del remaining[outcome.trial_id]
                    self._send(outcome)
                    if isinstance(outcome, TrialFailed) and outcome.error == "out_of_memory":
                        self._send(Notice(text=outcome.reason))
            except InterruptedRun:
                break  # the trials have checkpoints
            except RightrankError as error:
                self._send(Refused(reason=str(error), exit_status=error.exit_status))
                break
            except OSError as error:
                self._executor = None  # what it was doing is not undone
                self._wait_for_disk(error, until)
        self._send(TaskEnded())

    def _wait_for_disk(self, error: OSError, until: float) -> None:
        """Say that this machine's disk fails, and wait for a while."""
        text = f"a worker on {platform.node()}: {error.filename or 'its disk'}: {error.strerror or error}"
        if time.monotonic() > until:
            self._send(Refused(reason=f"{text}, for {DISK_SECONDS:.0f} s; free some space", exit_status=1))
            self._stop.set()
        elif text != self._said:
            self._send(Notice(text=f"{text}; it tries again until that has passed"))
        self._said = text
        self._stop.wait(DISK_PAUSE)

    def make_executor(self, setup: Setup) -> Executor:
        """The executor of this process, at the first task.

        Raises:
            RunError: what is prepared here has another fingerprint than the driver's.
        """
        from rightrank.runs.executor import LocalExecutor
        from rightrank.runs.folder import RunFolder
        from rightrank.runs.prepare import prepare
        from rightrank.runs.values import Request
        from rightrank.schema.settings import SelectSettings

        request = Request(setup.model, None, setup.data, SelectSettings(**setup.settings), setup.begun)
        prepared = prepare(request, self._scratch / "cache")
        if prepared.started.fingerprint != setup.fingerprint:
            raise RunError(
                f"a worker on {platform.node()} found a different model or different data at {setup.model} and {setup.data}: "
                "give paths that lead to the same files on every machine"
            )
        return LocalExecutor(prepared.runtime, RunFolder(setup.folder), self, prepared.planned)

    def on_event(self, event: Event) -> None:
        """Send the starts, the steps and the notices of the trials."""
        now = time.monotonic()
        if isinstance(event, TrialStarted | Notice):
            self._send(event)
        elif isinstance(event, StepDone | Evaluating) and now - self._last_step >= STEP_SECONDS:
            self._last_step = now
            self._send(event)

    def should_stop(self) -> bool:
        return self._stop.is_set()


def versions() -> dict[str, str]:
    """Versions that must be the same on every machine."""
    own = {"rightrank": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in SAME_EVERYWHERE}


def serve(commands: TextIO, messages: TextIO, make_worker: Callable[[Send], Worker] = Worker) -> None:
    """Run a worker until the stream of commands ends."""
    worker = make_worker(partial(_write, messages))
    threading.Thread(target=worker.follow, args=(commands,), daemon=True).start()
    worker.run()


def _write(messages: TextIO, message: WorkerMessage) -> None:
    with suppress(BrokenPipeError):  # the driver has ended, and the stream of commands with it
        messages.write(message.model_dump_json() + "\n")
        messages.flush()


def main(make_worker: Callable[[Send], Worker] = Worker) -> None:
    """Serve on stdin and stdout; whatever else prints goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver, which then stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, messages, make_worker)


if __name__ == "__main__":
    main()
