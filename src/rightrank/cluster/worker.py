"""A worker loads its own base model, prepares the driver's request, and trains the tasks that it receives.

It appends the events and the outcomes of its trials to a file in the run folder, and stops at its next step with checkpoints when the
driver has ended or has created the file `stop`.
"""

from __future__ import annotations

import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rightrank.cluster.pool import STOP_FILE, Task, WorkerMessage
from rightrank.schema.errors import InputError, InterruptedRun, RightrankError, RunError
from rightrank.schema.events import EvaluationProgress, Event, Listener, Notice, StepDone
from rightrank.schema.trials import TrialStarted
from rightrank.version import __version__

if TYPE_CHECKING:
    from rightrank.runs.selection import Executor, SelectionRequest

STEP_SECONDS = 0.5  # minimum time between two progress messages, and between two checks whether to stop
SHARED_PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """The selection. A worker prepares the same request as the driver and must compute the same fingerprint."""

    request: SelectionRequest  # with the ranks that the driver chose
    fingerprint: str
    folder: Path  # the run folder, shared by driver and workers
    working_folder: Path  # for relative paths
    versions: dict[str, str]  # of the driver

    @property
    def messages(self) -> Path:
        """Return the folder of the workers' messages and logs."""
        return self.folder / "workers"


class Worker(Listener):
    """Run tasks, one at a time, independent of how they arrive."""

    def __init__(self, setup: WorkerSetup, name: str) -> None:
        self._setup = setup
        self._path = setup.messages / f"{name}.jsonl"
        self._executor: Executor | None = None
        self._scratch = TemporaryDirectory(prefix="rightrank-worker-")
        self._parent = os.getppid()
        self._last_step = self._last_check = 0.0
        self._is_stopped = False
        with suppress(OSError):  # Without this folder, only absolute paths work.
            os.chdir(setup.working_folder)

    def run_task(self, task: Task) -> RightrankError | None:
        """Send an outcome for each trial of a task, except those that were stopped. Return an error that every other worker would meet."""
        try:
            self._executor = self._executor or self._open_executor()
            for outcome in self._executor.run(task.trials, task.base_loss):
                self._send(outcome)
        except InterruptedRun:
            return None  # The trials have checkpoints.
        except RightrankError as error:
            return error
        except OSError as error:
            path = error.filename or "its disk"
            return RunError(
                f"a worker on {platform.node()} cannot use {path}: {error.strerror or error}; repair that and run the same command again"
            )
        return None

    def close(self) -> None:
        """Remove the worker's files from the local disk."""
        self._scratch.cleanup()

    def _open_executor(self) -> Executor:
        """Build the executor of this process, at its first task.

        Raises:
            InputError: this machine has other versions of the packages, or does not see the run folder.
            RunError: the request that is prepared here has another fingerprint than the driver's.
        """
        from rightrank.runs.folder import RunFolder
        from rightrank.runs.prepare import LocalExecutor, prepare_selection

        setup, node, versions = self._setup, platform.node(), collect_versions()
        for package, expected in setup.versions.items():
            if versions[package] != expected:
                raise InputError(
                    f"a worker on {node} has {package} {versions[package]}, but this process has {expected}; install the same version on "
                    "every machine"
                )
        if not setup.messages.is_dir():
            raise InputError(
                f"a worker on {node} cannot read the run folder {setup.folder}; give an --out on a disk that all machines share"
            )
        prepared = prepare_selection(setup.request, Path(self._scratch.name) / "cache")
        if prepared.started.fingerprint != setup.fingerprint:
            raise RunError(
                f"a worker on {node} reads a different model or different data at {setup.request.model_name} and "
                f"{setup.request.data_name}: give paths that point to the same files on every machine"
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
        now = time.monotonic()
        if now - self._last_check >= STEP_SECONDS:
            self._last_check = now
            self._is_stopped = os.getppid() != self._parent or (self._setup.messages / STOP_FILE).exists()
        return self._is_stopped

    def _send(self, message: WorkerMessage) -> None:
        with self._path.open("ab") as file:
            file.write(message.model_dump_json().encode() + b"\n")


def collect_versions() -> dict[str, str]:
    """Return the versions that must be the same on every machine."""
    own_versions = {"rightrank": __version__, "python": platform.python_version()}
    return own_versions | {name: version(name) for name in SHARED_PACKAGES}
