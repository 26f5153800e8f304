"""Distribute trials over workers, queue the trials of lost workers again, and yield each outcome exactly once.

The pool does not depend on processes or clusters; a `Backend` starts the workers.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import Field, TypeAdapter

from rightrank.schema.errors import InterruptedRun, RightrankError, describe_error, log_traceback
from rightrank.schema.events import EvaluationProgress, Listener, Notice, StepDone
from rightrank.schema.trials import Trial, TrialFailed, TrialOutcome, TrialStarted

MAX_LOSSES = 3  # number of workers that a trial may lose without progress before it counts as failed
POLL_SECONDS = 0.5
GRACE_SECONDS = 25.0  # time for the workers to stop after a request
# What the lines of an error begin or continue with that say why a worker was lost: those of loky and of Ray.
LOSS_REASONS = ("The exit codes of the workers are", " because ")
STOP_FILE = "stop"

WorkerMessage: TypeAlias = Notice | StepDone | EvaluationProgress | TrialStarted | TrialOutcome
MESSAGE_ADAPTER: TypeAdapter[WorkerMessage] = TypeAdapter(Annotated[WorkerMessage, Field(discriminator="type")])


class RemoteWorker(ABC):
    """A worker in another process."""

    @abstractmethod
    def submit(self, trials: list[Trial], base_loss: float | None) -> Future[RightrankError | None]:
        """Train the trials, several of them in one pass if that is faster."""

    @abstractmethod
    def end(self, *, is_idle: bool) -> None:
        """End the worker. An idle one removes its files; any other one is ended immediately."""


class Backend(ABC):
    """Starts workers of one kind."""

    size: int  # the maximum number of workers

    @abstractmethod
    def start(self, name: str, slot: int) -> RemoteWorker:
        """Start a worker. Two workers at the same time have different slots, below `size`."""

    def require_alive(self) -> None:  # noqa: B027
        """Raise RunError if no worker can be reached any more."""

    def close(self) -> None:  # noqa: B027
        """Release what the backend holds besides its workers."""


@dataclass(slots=True)
class StartedWorker:
    """A worker as the driver sees it."""

    name: str
    remote: RemoteWorker
    messages: Path  # the file that the worker appends its messages to
    offset: int = 0  # the end of the messages that were read
    future: Future[RightrankError | None] | None = None  # of its task; None: idle
    remaining: dict[str, Trial] = field(default_factory=dict)  # trials of the task without an outcome
    step: int = 0  # the highest step that it reported in this task

    def read_new_messages(self) -> Iterator[WorkerMessage]:
        """Yield each message once, also if the caller stops between two of them. An incomplete last line waits for its end."""
        if not self.messages.exists():
            return
        with self.messages.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                yield MESSAGE_ADAPTER.validate_json(line)


class WorkerPool:
    """An `Executor` that trains in workers, which start on demand and stay until `close`.

    Args:
        folder: where the workers write their messages.
        task_trials: maximum number of trials for each task.
    """

    def __init__(self, backend: Backend, folder: Path, listener: Listener, *, task_trials: int = 1) -> None:
        self._backend, self._folder, self._listener, self._task_trials = backend, folder, listener, task_trials
        self._workers: dict[int, StartedWorker] = {}  # by slot
        self._num_started = 0
        self._queue: deque[list[Trial]] = deque()
        self._base_loss: float | None = None
        self._num_unfinished = 0  # trials without an outcome
        # For each trial: the number of workers that it has lost since its last progress, and the step it had reached.
        self._losses: dict[str, tuple[int, int]] = {}

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        """Yield one outcome for each trial as it ends; see `Executor`.

        Raises:
            InterruptedRun: `should_stop` returned True; the workers have saved checkpoints.
            InputError, RunError: no worker can run the selection; the message states why.
        """
        self._base_loss, self._num_unfinished = base_loss, len(trials)
        # The longest first: a long trial that starts last would delay the end.
        ordered = sorted(trials, key=lambda trial: -trial.arm.steps)
        size = max(1, min(self._task_trials, -(-len(ordered) // self._backend.size)))  # an even share for each worker
        self._queue.extend(ordered[start : start + size] for start in range(0, len(ordered), size))
        try:
            while self._num_unfinished:
                self._assign_tasks()
                yield from self._follow_workers()
                if self._listener.should_stop():
                    yield from self._stop_workers()
                    raise InterruptedRun(f"stopped; {self._num_unfinished} trainings are not finished")
        finally:
            if self._num_unfinished:
                list(self._stop_workers())

    def close(self) -> None:
        for worker in self._workers.values():
            worker.remote.end(is_idle=True)
        self._workers.clear()
        self._backend.close()

    def _list_futures(self) -> dict[int, Future[RightrankError | None]]:
        """Return the futures of the busy workers by slot."""
        return {slot: future for slot, worker in self._workers.items() if (future := worker.future) is not None}

    def _assign_tasks(self) -> None:
        """Give the tasks of the queue to idle workers, and start workers for the others."""
        idle = [slot for slot in range(self._backend.size) if slot not in self._list_futures()]
        idle.sort(key=lambda slot: slot not in self._workers)  # Those that have loaded their base come first.
        for slot in idle[: len(self._queue)]:
            if slot not in self._workers:
                self._num_started += 1
                name = f"worker-{os.getpid()}-{self._num_started}"
                remote = self._backend.start(name, slot)
                self._workers[slot] = StartedWorker(name, remote, self._folder / f"{name}.jsonl")
            worker, trials = self._workers[slot], self._queue.popleft()
            worker.remaining = {trial.trial_id: trial for trial in trials}
            worker.step, worker.future = 0, worker.remote.submit(trials, self._base_loss)

    def _follow_workers(self) -> Iterator[TrialOutcome]:
        """Wait a moment for the busy workers, handle their messages, and replace those that were lost."""
        self._backend.require_alive()
        futures = self._list_futures()
        wait(futures.values(), POLL_SECONDS, FIRST_COMPLETED)
        for slot, future in futures.items():
            worker, is_done = self._workers[slot], future.done()  # asked first, so that all its messages are read
            yield from self._handle_messages(worker)
            if not is_done:
                continue
            if (error := future.exception()) is not None:
                log_traceback(error)
                yield from self._replace_worker(slot, _describe_loss(error))
                continue
            worker.future = None
            if (refusal := future.result()) is not None:
                raise refusal
            self._queue.extend([trial] for trial in worker.remaining.values())  # none, unless it was stopped

    def _handle_messages(self, worker: StartedWorker) -> Iterator[TrialOutcome]:
        for message in worker.read_new_messages():
            if isinstance(message, StepDone):
                worker.step = max(worker.step, message.step)
            if isinstance(message, StepDone | EvaluationProgress | Notice | TrialStarted):
                self._listener.on_event(message)
            elif worker.remaining.pop(message.trial_id, None) is not None:
                self._num_unfinished -= 1
                yield message

    def _replace_worker(self, slot: int, reason: str) -> Iterator[TrialOutcome]:
        """End a lost worker and queue its trials, each as a separate task.

        A trial that has lost `MAX_LOSSES` workers without making progress fails.
        """
        worker = self._workers.pop(slot)
        worker.remote.end(is_idle=False)
        self._listener.on_event(Notice(text=f"{worker.name} was lost: {reason}"))
        for trial in worker.remaining.values():
            losses, step = self._losses.get(trial.trial_id, (0, 0))
            losses = 1 if worker.step > step else losses + 1
            self._losses[trial.trial_id] = losses, max(step, worker.step)
            if losses < MAX_LOSSES:
                self._queue.appendleft([trial])
            else:
                self._num_unfinished -= 1
                text = f"{trial.arm.format_label()} lost {MAX_LOSSES} workers (the last: {reason})"
                yield TrialFailed(**trial.fields, error="error", reason=text)

    def _stop_workers(self) -> Iterator[TrialOutcome]:
        """Ask the workers to stop with checkpoints, yield what still ends within the grace period, and end the others."""
        stop, until = self._folder / STOP_FILE, time.monotonic() + GRACE_SECONDS
        stop.touch()
        try:
            while self._list_futures() and time.monotonic() < until:
                yield from self._follow_workers()
        finally:
            for slot in self._list_futures():
                self._workers.pop(slot).remote.end(is_idle=False)
            stop.unlink()
            self._queue.clear()
            self._losses.clear()


def _describe_loss(error: BaseException) -> str:
    """Describe why a worker was lost, by the line of loky's or Ray's error that says so."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if any(text in line for text in LOSS_REASONS)), describe_error(error))
