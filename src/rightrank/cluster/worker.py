"""A worker loads its own base model, prepares the driver's request, and trains the tasks that it receives.

`python -m rightrank.cluster.worker N` runs a worker in a separate process. It receives commands and sends messages through the pipe
with descriptor N. When the other end closes, the driver has ended, and the worker stops at its next step with checkpoints.
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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from rightrank.schema.errors import InterruptedRun, RightrankError, RunError
from rightrank.schema.events import EvaluationProgress, Event, Listener, Notice, StepDone
from rightrank.schema.trials import Trial, TrialFailed, TrialOutcome, TrialStarted
from rightrank.version import __version__

if TYPE_CHECKING:
    from rightrank.runs.selection import Executor, SelectionRequest

STEP_SECONDS = 0.5  # minimum time between two progress messages
DISK_SECONDS = 600.0  # how long a worker waits for a disk that is full or fails
DISK_PAUSE = 5.0  # between two attempts
SHARED_PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """The selection. A worker prepares the same request as the driver and must compute the same fingerprint."""

    request: SelectionRequest  # with the ranks that the driver chose
    fingerprint: str
    folder: Path  # the run folder, shared by driver and workers
    working_folder: Path  # for relative paths


@dataclass(frozen=True, slots=True)
class Task:
    """Trials for one worker, which trains several of them in one pass if that is faster."""

    trials: list[Trial]
    base_loss: float | None


@dataclass(frozen=True, slots=True)
class StopTask:
    """Stop the current task at the next step and save checkpoints."""


@dataclass(frozen=True, slots=True)
class WorkerReady:
    versions: dict[str, str]
    sees_folder: bool  # whether it can read the driver's run folder


@dataclass(frozen=True, slots=True)
class TaskEnded:
    """The worker is idle: every trial of the task has an outcome, or the worker was stopped."""


@dataclass(frozen=True, slots=True)
class SelectionRefused:
    """The worker cannot run the selection, and no other worker could; `reason` is a message for the user."""

    reason: str
    exit_status: int


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker ended unexpectedly. The driver creates this record; no worker sends it."""

    reason: str
    was_killed: bool = False  # by SIGKILL, which the system sends when it runs out of memory
    is_machine_lost: bool = False  # whether the machine or the network failed, rather than the worker


WorkerMessage: TypeAlias = (
    WorkerReady | TaskEnded | SelectionRefused | Notice | StepDone | EvaluationProgress | TrialStarted | TrialOutcome
)
Send: TypeAlias = Callable[[WorkerMessage], None]


class Worker(Listener):
    """Handle commands and send messages, independent of the transport. Tasks run on the thread that calls `run`."""

    def __init__(self, setup: WorkerSetup, send: Send) -> None:
        self._setup, self._send = setup, send
        self._executor: Executor | None = None
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._scratch = Path(tempfile.mkdtemp(prefix="rightrank-worker-"))
        self._stop = threading.Event()
        self._last_notice = ""  # the last notice about the disk
        self._last_step = 0.0

    def receive(self, command: Task | StopTask | None) -> None:
        """Handle a command; may be called from any thread. None is the last one: `run` stops the current task and returns."""
        if isinstance(command, Task):
            self._stop.clear()
        else:
            self._stop.set()
        if not isinstance(command, StopTask):
            self._tasks.put(command)

    def run(self) -> None:
        """Send `WorkerReady`, then run the received tasks."""
        with suppress(OSError):  # Without this folder, only absolute paths work.
            os.chdir(self._setup.working_folder)
        try:
            self._send(WorkerReady(collect_versions(), sees_folder=(self._setup.folder / "journal.jsonl").is_file()))
            while (task := self._tasks.get()) is not None:
                self.run_task(task)
        finally:
            self.close()

    def close(self) -> None:
        """Remove the worker's files from the local disk."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def run_task(self, task: Task) -> None:
        """Send an outcome for each trial of a task, or `Refused` for an error that no other worker could avoid."""
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
                break  # The trials have checkpoints.
            except RightrankError as error:
                self._send(SelectionRefused(reason=str(error), exit_status=error.exit_status))
                break
            except OSError as error:
                self._executor = None  # Its state may be inconsistent.
                self._wait_for_disk(error, until)
        self._send(TaskEnded())

    def _wait_for_disk(self, error: OSError, until: float) -> None:
        """Report that this machine's disk fails, and wait before the next attempt."""
        text = f"a worker on {platform.node()} cannot use {error.filename or 'its disk'}: {error.strerror or error}"
        if time.monotonic() > until:
            self._send(
                SelectionRefused(reason=f"{text}; it tried for {DISK_SECONDS:.0f} s; free some space", exit_status=1)
            )
            self._stop.set()
        elif text != self._last_notice:
            self._send(Notice(text=f"{text}; it keeps trying for {DISK_SECONDS:.0f} s"))
        self._last_notice = text
        self._stop.wait(DISK_PAUSE)

    def make_executor(self, setup: WorkerSetup) -> Executor:
        """Build the executor of this process, at its first task.

        Raises:
            RunError: the request that is prepared here has another fingerprint than the driver's.
        """
        from rightrank.runs.folder import RunFolder
        from rightrank.runs.prepare import LocalExecutor, prepare_selection

        request = setup.request
        prepared = prepare_selection(request, self._scratch / "cache")
        if prepared.started.fingerprint != setup.fingerprint:
            raise RunError(
                f"a worker on {platform.node()} reads a different model or different data at {request.model_name} and {request.data_name}: "
                "give paths that point to the same files on every machine"
            )
        return LocalExecutor(prepared.runtime, RunFolder(setup.folder), self, prepared.planned)

    def on_event(self, event: Event) -> None:
        """Send the starts, the steps and the notices of the trials."""
        now = time.monotonic()
        if isinstance(event, TrialStarted | Notice):
            self._send(event)
        elif isinstance(event, StepDone | EvaluationProgress) and now - self._last_step >= STEP_SECONDS:
            self._last_step = now
            self._send(event)

    def should_stop(self) -> bool:
        return self._stop.is_set()


def collect_versions() -> dict[str, str]:
    """Return the versions that must be the same on every machine."""
    own_versions = {"rightrank": __version__, "python": platform.python_version()}
    return own_versions | {name: version(name) for name in SHARED_PACKAGES}


def main() -> None:
    """Run a worker for the driver at the other end of the pipe. Printed output goes to the worker's log."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The driver handles Ctrl-C and then stops its workers.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    driver = Connection(int(sys.argv[1]))
    make_worker, setup = driver.recv()

    def send(message: WorkerMessage) -> None:
        with suppress(ConnectionError):  # The driver has ended.
            driver.send(message)

    def follow() -> None:
        with suppress(EOFError, ConnectionError):
            for command in iter(driver.recv, None):
                worker.receive(command)
        worker.receive(None)

    worker: Worker = make_worker(setup, send)
    threading.Thread(target=follow, daemon=True).start()
    worker.run()


if __name__ == "__main__":
    main()
