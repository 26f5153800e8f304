"""Distribute trials over workers, requeue the trials of lost workers, and yield each outcome exactly once.

The pool does not depend on processes or clusters; a `WorkerBackend` handles those. It runs on one thread and reads the time from an
injected clock, so tests can drive it in simulated time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from rightrank.cluster.worker import (
    SelectionRefused,
    StopTask,
    Task,
    TaskEnded,
    WorkerLost,
    WorkerMessage,
    WorkerReady,
)
from rightrank.schema.errors import InputError, InterruptedRun, RunError
from rightrank.schema.events import EvaluationProgress, Listener, Notice, StepDone
from rightrank.schema.trials import Trial, TrialFailed, TrialOutcome, TrialStarted

MAX_LOSSES = 3  # number of workers that a trial may lose without progress before it counts as failed
HANG_SECONDS = 600.0  # after this time without a message, a worker is replaced
STARTUP_FACTOR = 6  # allows a longer silence while a worker loads, prepares or evaluates the base model
POLL_SECONDS = 1.0
GRACE_SECONDS = 25.0  # time for a worker to stop after a request


class WorkerBackend(Protocol):
    """The interface that starts, reaches and ends workers of one kind: local processes, Ray actors, or a simulation.

    An implementation must keep these rules:

    - The pool chooses the workers' names and never reuses one.
    - All methods are called from one thread. `start` and `send` return at once, because while they block, the pool detects neither hangs
      nor the user's request to stop.
    - After `start(w)`, the first message of `w` is `WorkerReady`, `SelectionRefused` or `WorkerLost`.
    - Messages of one worker arrive in the order in which it sent them, each exactly once.
    - When a worker ends by itself, `messages` reports a `WorkerLost` after everything that it sent.
    - `send` never raises for a worker that has just ended; its `WorkerLost` follows.
    - After `end(w)` the worker holds no memory or device. Late messages of `w` are allowed: the pool ignores them.
    """

    def start(self, worker: str) -> None: ...

    # Send a task to an idle worker, or a stop to a busy one, which then answers with `TaskEnded`.
    def send(self, worker: str, command: Task | StopTask) -> None: ...

    def end(self, worker: str) -> None: ...  # immediately, even if the worker is busy

    # Wait at most `seconds` for the first message, then return all that have arrived.
    def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]: ...

    def close(self) -> None: ...  # End all workers and release the backend's resources.


@dataclass(slots=True)
class _WorkerState:
    is_ready: bool = False
    task: Task | None = None
    remaining: dict[str, Trial] = field(default_factory=dict)  # trials of the task without an outcome
    last_message: float = 0.0  # when it arrived, or when the task was assigned
    is_stepping: bool = False  # whether it has reported a step of its task
    step: int = 0  # the highest step that it reported
    longest_silence: float = 0.0  # seconds between two messages while stepping


class WorkerPool:
    """An `Executor` that trains in workers, which start on demand and stay until `close`.

    Args:
        workers: maximum number of workers.
        versions: versions of the packages that must be the same everywhere.
        task_trials: maximum number of trials for each task.
    """

    def __init__(
        self,
        backend: WorkerBackend,
        workers: int,
        versions: Mapping[str, str],
        listener: Listener | None = None,
        *,
        task_trials: int = 1,
        hang_seconds: float = HANG_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._size, self._versions, self._task_trials, self._hang_seconds = workers, versions, task_trials, hang_seconds
        self._listener = listener or Listener()
        self._clock = clock
        self._workers: dict[str, _WorkerState] = {}
        self._queue: deque[Task] = deque()
        self._pending_messages: deque[tuple[str, WorkerMessage | WorkerLost]] = deque()
        self._unfinished = 0  # trials without an outcome
        # For each trial: the number of workers that it has lost since its last progress, and the step it had reached.
        self._losses: dict[str, tuple[int, int]] = {}
        self._started = self._failed_starts = 0
        self._any_was_ready = False

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        """Yield one outcome for each trial as it ends; see `Executor`.

        Raises:
            InterruptedRun: `should_stop` returned True; the workers have saved checkpoints.
            InputError, RunError: no worker can run the selection; the message states why.
        """
        self._submit(trials, base_loss)
        try:
            while self._unfinished:
                self._assign_tasks()
                yield from self._read_messages()
                yield from self._replace_hung_workers()
                if self._listener.should_stop():
                    yield from self._stop_workers()
                    raise InterruptedRun(f"stopped; {self._unfinished} trainings are not finished")
        finally:
            if self._unfinished:
                list(self._stop_workers())

    def list_busy_workers(self) -> list[str]:
        return [name for name, worker in self._workers.items() if worker.task is not None]

    def close(self) -> None:
        self._backend.close()
        self._workers.clear()

    def _submit(self, trials: Sequence[Trial], base_loss: float | None) -> None:
        """Queue trials, the longest first: a long trial that starts last would delay the end."""
        self._unfinished = len(trials)
        ordered = sorted(trials, key=lambda trial: -trial.arm.steps)
        # An even share for each worker, at most `task_trials`.
        size = max(1, min(self._task_trials, -(-len(ordered) // self._size)))
        for start in range(0, len(ordered), size):
            self._queue.append(Task(trials=ordered[start : start + size], base_loss=base_loss))

    def _assign_tasks(self) -> None:
        """Start workers for the queue and assign tasks to idle ones."""
        num_needed = min(self._size, len(self._queue) + len(self.list_busy_workers()))
        while len(self._workers) < num_needed:
            self._started += 1
            name = f"worker-{self._started}"
            self._workers[name] = _WorkerState(last_message=self._clock())
            self._backend.start(name)
        for name, worker in self._workers.items():
            if not (self._queue and worker.is_ready and worker.task is None):
                continue
            task = self._queue.popleft()
            worker.task, worker.last_message, worker.is_stepping, worker.step = task, self._clock(), False, 0
            worker.remaining = {trial.trial_id: trial for trial in task.trials}
            self._backend.send(name, task)

    def _read_messages(self) -> Iterator[TrialOutcome]:
        """Handle the messages that have arrived. If the caller stops iterating, the next call handles the remaining ones."""
        if not self._pending_messages:
            self._pending_messages.extend(self._backend.messages(POLL_SECONDS))
        while self._pending_messages:
            yield from self._handle_message(*self._pending_messages.popleft())

    def _handle_message(self, name: str, message: WorkerMessage | WorkerLost) -> Iterator[TrialOutcome]:
        worker = self._workers.get(name)
        if worker is None:
            return  # It was removed; its trials are queued or assigned to other workers.
        now, last_message = self._clock(), worker.last_message
        worker.last_message = now
        match message:
            case WorkerReady():
                self._admit_worker(name, worker, message)
            case WorkerLost():
                yield from self._replace_worker(name, message)
            case SelectionRefused():
                raise (InputError if message.exit_status == 2 else RunError)(message.reason)
            case TaskEnded():
                yield from self._requeue_trials(worker, WorkerLost(f"{name} left it unfinished"))
            case StepDone() | EvaluationProgress():
                if worker.is_stepping:
                    worker.longest_silence = max(worker.longest_silence, now - last_message)
                worker.is_stepping = True
                if isinstance(message, StepDone):
                    worker.step = max(worker.step, message.step)
                self._listener.on_event(message)
            case Notice() | TrialStarted():
                self._listener.on_event(message)
            case _:
                if worker.remaining.pop(message.trial_id, None) is not None:
                    self._unfinished -= 1
                    yield message

    def _admit_worker(self, name: str, worker: _WorkerState, ready: WorkerReady) -> None:
        """Accept a worker that has the driver's versions and sees the driver's files."""
        for package, version in self._versions.items():
            if ready.versions.get(package) != version:
                raise InputError(
                    f"{name} has {package} {ready.versions.get(package, 'of unknown version')}, but this process has {version}; "
                    "install the same version on every machine"
                )
        if not ready.sees_folder:
            raise InputError(
                f"{name} cannot read the run folder that this process writes to; give an --out on a disk that all machines share"
            )
        worker.is_ready = self._any_was_ready = True

    def _replace_worker(self, name: str, lost: WorkerLost) -> Iterator[TrialOutcome]:
        """Remove a lost worker and requeue its trials."""
        worker = self._remove_worker(name)
        if not worker.is_ready:
            self._failed_starts += 1
            if not self._any_was_ready and self._failed_starts > self._size:
                raise RunError(f"no worker could start (the last: {lost.reason})")
        self._listener.on_event(Notice(text=f"{name} was lost: {lost.reason}"))
        yield from self._requeue_trials(worker, lost)

    def _requeue_trials(self, worker: _WorkerState, lost: WorkerLost) -> Iterator[TrialOutcome]:
        """Clear the worker's task and queue each of its trials without an outcome as a separate task.

        A trial that has lost `MAX_LOSSES` workers without making progress fails. Workers that were lost because their machine failed do not
        count, since a training cannot cause that.
        """
        task, trials = worker.task, list(worker.remaining.values())
        worker.task, worker.remaining = None, {}
        for trial in trials:
            assert task is not None
            losses, step = self._losses.get(trial.trial_id, (0, 0))
            losses = (0 if worker.step > step else losses) + (not lost.is_machine_lost)
            self._losses[trial.trial_id] = losses, max(step, worker.step)
            if losses < MAX_LOSSES:
                self._queue.appendleft(Task(trials=[trial], base_loss=task.base_loss))
            else:
                self._unfinished -= 1
                memory = "; the system kills processes when it runs out of memory" if lost.was_killed else ""
                reason = f"{trial.arm.format_label()} lost {MAX_LOSSES} workers (the last: {lost.reason}){memory}"
                kind: Literal["out_of_memory", "error"] = "out_of_memory" if lost.was_killed else "error"
                yield TrialFailed(**trial.fields, error=kind, reason=reason)

    def _replace_hung_workers(self) -> Iterator[TrialOutcome]:
        """End workers that are silent for longer than `HANG_SECONDS` and than 20 times their longest silence so far."""
        now = self._clock()
        for name, worker in list(self._workers.items()):
            factor = 1 if worker.is_stepping else STARTUP_FACTOR
            limit = max(factor * self._hang_seconds, 20 * worker.longest_silence)
            silence = now - worker.last_message
            if (worker.task is not None or not worker.is_ready) and silence > limit:
                yield from self._replace_worker(name, WorkerLost(f"no message for {silence:.0f} s"))

    def _stop_workers(self) -> Iterator[TrialOutcome]:
        """Ask the workers to stop with checkpoints, yield what still ends within the grace period, and end the others."""
        self._queue.clear()
        for name in self.list_busy_workers():
            self._backend.send(name, StopTask())
        until = self._clock() + GRACE_SECONDS
        while self.list_busy_workers() and self._clock() < until:
            yield from self._read_messages()
        for name in self.list_busy_workers():
            self._remove_worker(name)
        self._queue.clear()  # Stopped trials were requeued.
        self._losses.clear()

    def _remove_worker(self, name: str) -> _WorkerState:
        self._backend.end(name)
        return self._workers.pop(name)
