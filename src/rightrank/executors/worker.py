"""A worker: a process with a base of its own that prepares the same requests as the driver and trains what it is given.

`python -m rightrank.executors.worker` reads commands as lines on stdin and tells news as lines on stdout. Where stdin ends,
the driver is gone: the worker stops at its next step, with checkpoints.
"""

from __future__ import annotations

import contextlib
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
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeAlias

from pydantic import ValidationError

from rightrank.errors import InputError, InterruptedRun, RightrankError, RunError
from rightrank.executors import Executor
from rightrank.executors.messages import (
    COMMAND,
    Group,
    Job,
    Notice,
    Ready,
    Refused,
    Step,
    Stop,
    Task,
    TaskEnded,
    WorkerMessage,
    WorkerSetup,
)
from rightrank.records import Preparing, RunEvent, StepDone, TrialFailed, TrialStarted
from rightrank.records.observer import Observer
from rightrank.version import __version__

if TYPE_CHECKING:
    from rightrank.io.models import LoadedModel

NOT_UNDERSTOOD = f"a worker there, rightrank {__version__}, does not understand what it is told: install the same version on every machine"
PROGRESS_SECONDS = 0.5  # seconds between two signs of progress
SAME_EVERYWHERE = ("torch", "transformers", "peft")


class Worker:
    """What runs inside a worker, whatever carries its words."""

    def __init__(self, tell: Callable[[WorkerMessage], None]) -> None:
        self._tell = tell
        self._jobs: dict[str, Job] = {}
        self._executors: dict[str, Executor] = {}
        self._bases: dict[tuple[object, ...], LoadedModel] = {}
        self._scratch = Path(tempfile.mkdtemp(prefix="rightrank-worker-"))
        self._stop = threading.Event()
        self._is_asked_to_stop: Callable[[], bool] = self._stop.is_set
        self._told = 0.0

    def begin(self, setup: WorkerSetup) -> None:
        """Say who this is, and what it sees of the share."""
        self._jobs = {job.name: job for job in setup.jobs}
        with contextlib.suppress(OSError):  # not there: then only absolute paths lead anywhere
            os.chdir(setup.working_folder)
        try:
            ready = Ready(versions=versions(), token=self._token(setup))
            self._tell(ready if setup.group is None else self._joined(setup.group, ready))
        except RightrankError as error:  # of a store
            self._tell(Refused(reason=f"{platform.node()}: {error}", exit_status=error.exit_status))

    def stop(self) -> None:
        """Leave the task under way at its next step; from any thread."""
        self._stop.set()

    def work(self, task: Task) -> None:
        """Train what the task holds; what can't be mended is told as `Refused`."""
        self._stop.clear()
        try:
            for outcome in self._executor(self._jobs[task.job]).run(task.trials, task.base_loss):
                self._tell(outcome)
                if isinstance(outcome, TrialFailed) and outcome.error == "out_of_memory":
                    self._tell(Notice(text=outcome.reason))
        except InterruptedRun:
            pass  # its trials have checkpoints
        except RightrankError as error:
            self._tell(Refused(reason=str(error), exit_status=error.exit_status))
        self._tell(TaskEnded(number=task.number))

    def close(self) -> None:
        """Remove what lies on this machine's own disk."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _joined(self, group: Group, ready: Ready) -> Ready:
        """What the first of the group tells for all: one that differs from it, if any does."""
        from rightrank.engine.distributed import broadcast
        from rightrank.executors.group import join

        join(group)
        self._is_asked_to_stop = lambda: bool(broadcast(0, self._stop.is_set()))  # all leave at the same step
        all_told = [broadcast(number, ready.model_dump()) for number in range(group.size)]
        return Ready.model_validate(next((one for one in all_told if one != all_told[0]), all_told[0]))

    def _token(self, setup: WorkerSetup) -> str | None:
        """What the probe holds, seen from here; None where it is not there."""
        probe = Path(setup.share) / setup.probe
        if "://" in setup.share:
            from rightrank.io.store import Store

            probe = self._scratch / "probe"
            Store(setup.share).get(setup.probe, probe)
        try:
            return probe.read_text(encoding="utf-8")
        except OSError:
            return None

    def _executor(self, job: Job) -> Executor:
        """What runs the job's trials: built at its first task, over a base that jobs share."""
        if job.name not in self._executors:
            self._executors[job.name] = self._made(job, self._scratch / str(len(self._executors)))
        return self._executors[job.name]

    def _made(self, job: Job, scratch: Path) -> Executor:
        from rightrank.executors.local import LocalExecutor
        from rightrank.executors.stored import StoredExecutor, StoreSync
        from rightrank.io.run_folder import RunFolder
        from rightrank.io.store import run_store
        from rightrank.preparation import Request, prepare
        from rightrank.settings import make_settings

        settings = make_settings(job.settings)
        scratch.mkdir()
        prepared = prepare(
            Request(job.model, None, job.data, settings, job.known_settings), scratch / "cache", bases=self._bases
        )
        if prepared.started.fingerprint != job.fingerprint:
            raise RunError(
                f"a worker on {platform.node()} found another model or other data under {job.model} and {job.data}: "
                "give paths that lead to the same files on every machine"
            )
        folder = RunFolder(scratch / "run" if settings.store else job.folder)
        sync = StoreSync(folder, run_store(settings.store, job.fingerprint)) if settings.store else None

        def on_event(event: RunEvent) -> None:
            if isinstance(event, TrialStarted):
                self._tell(event)
            elif isinstance(event, StepDone | Preparing):
                self._step(event)
            if sync is not None and isinstance(event, StepDone):
                sync.send_due()

        executor = LocalExecutor(
            prepared.bench,
            folder,
            Observer(
                on_event=on_event,
                notice=lambda text: self._tell(Notice(text=text)),
                should_stop=self._is_asked_to_stop,
            ),
            prepared.planned.largest_pack if prepared.planned else None,
        )
        return executor if sync is None else StoredExecutor(executor, sync)

    def _step(self, event: StepDone | Preparing) -> None:
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS:
            self._told = now
            self._tell(Step(event=event))


def versions() -> dict[str, str]:
    """What must be the same wherever a selection's trials run."""
    return {
        "rightrank": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in SAME_EVERYWHERE},
    }


def main(make: Maker = Worker) -> None:
    """Commands from stdin, news to what was stdout; whatever else prints goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the driver's, which asks its workers to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    news = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, news, make)


Maker: TypeAlias = Callable[[Callable[[WorkerMessage], None]], Worker]


class Service:
    """A worker with a thread of its own for its tasks; what carries the commands calls `say`."""

    def __init__(self, tell: Callable[[WorkerMessage], None], make: Maker = Worker) -> None:
        self.worker = make(tell)
        self._tell = tell
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()

    def say(self, line: str | bytes) -> None:
        """Take one command."""
        try:
            command = COMMAND.validate_json(line)
        except ValidationError:
            self._tell(Refused(reason=f"{platform.node()}: {NOT_UNDERSTOOD}", exit_status=InputError.exit_status))
            return
        match command:
            case WorkerSetup() as setup:
                self.worker.begin(setup)
            case Stop():
                self.worker.stop()
            case Task() as task:
                self._tasks.put(task)

    def leave(self) -> None:
        """No more commands will come."""
        self._tasks.put(None)
        self.worker.stop()

    def work(self) -> None:
        """Task after task, until told to leave."""
        try:
            while (task := self._tasks.get()) is not None:
                self.worker.work(task)
        finally:
            self.worker.close()


def serve(commands: TextIO, news: TextIO, make: Maker = Worker) -> None:
    """Until the commands end."""

    def tell(message: WorkerMessage) -> None:
        try:
            news.write(message.model_dump_json() + "\n")
            news.flush()
        except BrokenPipeError:
            service.worker.stop()  # nobody listens any more

    def listen() -> None:
        for line in commands:
            service.say(line)
        service.leave()

    service = Service(tell, make)
    threading.Thread(target=listen, daemon=True).start()
    service.work()


if __name__ == "__main__":
    main()
