"""Distributes trials over workers, requeues the trials of lost workers, and yields each outcome exactly once.

The pool knows neither processes nor clusters: a `Crew` does. It runs on one thread and reads the time from an
injected clock, so tests drive it in simulated time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from rightrank.plugins.cluster.worker import Ready, Refused, Stop, Task, TaskEnded, WorkerLost, WorkerMessage
from rightrank.schema.errors import InputError, InterruptedRun, RunError
from rightrank.schema.events import Evaluating, Listener, Notice, StepDone
from rightrank.schema.trials import Trial, TrialFailed, TrialOutcome, TrialStarted

MAX_LOSSES = 3  # workers that a trial may lose without getting further before it counts as failed
HANG_SECONDS = 600.0  # without a message: the worker is replaced
STARTUP_FACTOR = 6  # longer silence is allowed while a worker loads, prepares or evaluates the base
POLL_SECONDS = 1.0
GRACE_SECONDS = 25.0  # for a worker to stop on request


class Crew(Protocol):
    """Starts, reaches and ends workers of one kind: local processes, Ray actors, or a simulation.

    An implementation must keep these rules:

    - The pool chooses the workers' names and never reuses one.
    - All methods are called from one thread. `start` and `send` return at once: while they block, the pool sees neither hangs
      nor the user's request to stop.
    - After `start(w)`, the first message of `w` is `Ready`, `Refused` or `WorkerLost`.
    - Messages of one worker arrive in the order in which it sent them, none twice.
    - When a worker ends by itself, `messages` reports a `WorkerLost` after everything that it sent.
    - `send` never raises for a worker that has just ended; its `WorkerLost` follows.
    - After `end(w)` the worker holds no memory or device. Late messages of `w` are allowed: the pool ignores them.
    """

    def start(self, worker: str) -> None: ...

    # A task to an idle worker; a stop to a busy one, which then sends `TaskEnded`.
    def send(self, worker: str, command: Task | Stop) -> None: ...

    def end(self, worker: str) -> None: ...  # at once, whatever it is doing

    # Wait so long for the first.
    def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]: ...

    def close(self) -> None: ...  # end all workers, and release what the crew holds


@dataclass(slots=True)
class _Worker:
    is_ready: bool = False
    task: Task | None = None
    remaining: dict[str, Trial] = field(default_factory=dict)  # trials of the task without an outcome
    last_message: float = 0.0  # when it arrived, or when the task was assigned
    is_stepping: bool = False  # has reported a step of its task
    step: int = 0  # the furthest that was reported
    longest_silence: float = 0.0  # seconds between two messages while stepping


class Pool:
    """The `Executor` of workers; they start on demand and stay until `close`.

    Args:
        workers: at most.
        versions: of every package that must be the same everywhere.
        task_trials: trials per task, at most.
    """

    def __init__(
        self,
        crew: Crew,
        workers: int,
        versions: Mapping[str, str],
        listener: Listener | None = None,
        *,
        task_trials: int = 1,
        hang_seconds: float = HANG_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._crew = crew
        self._size, self._versions, self._task_trials, self._hang_seconds = workers, versions, task_trials, hang_seconds
        self._listener = listener or Listener()
        self._clock = clock
        self._workers: dict[str, _Worker] = {}
        self._queue: deque[Task] = deque()
        self._unread: deque[tuple[str, WorkerMessage | WorkerLost]] = deque()
        self._unfinished = 0  # trials without an outcome
        # Trial → workers lost while they trained it, since it last got further than this step.
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
                    raise InterruptedRun(f"stopped with {self._unfinished} trainings to do")
        finally:
            if self._unfinished:
                list(self._stop_workers())

    def busy(self) -> list[str]:
        return [name for name, worker in self._workers.items() if worker.task is not None]

    def close(self) -> None:
        self._crew.close()
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
        wanted = min(self._size, len(self._queue) + len(self.busy()))
        while len(self._workers) < wanted:
            self._started += 1
            name = f"worker-{self._started}"
            self._workers[name] = _Worker(last_message=self._clock())
            self._crew.start(name)
        for name, worker in self._workers.items():
            if not (self._queue and worker.is_ready and worker.task is None):
                continue
            task = self._queue.popleft()
            worker.task, worker.last_message, worker.is_stepping, worker.step = task, self._clock(), False, 0
            worker.remaining = {trial.trial_id: trial for trial in task.trials}
            self._crew.send(name, task)

    def _read_messages(self) -> Iterator[TrialOutcome]:
        """Handle what has arrived. If the caller stops iterating, the next call handles the rest."""
        if not self._unread:
            self._unread.extend(self._crew.messages(POLL_SECONDS))
        while self._unread:
            yield from self._handle(*self._unread.popleft())

    def _handle(self, name: str, message: WorkerMessage | WorkerLost) -> Iterator[TrialOutcome]:
        worker = self._workers.get(name)
        if worker is None:
            return  # removed before; its trials are queued or assigned elsewhere
        now, before = self._clock(), worker.last_message
        worker.last_message = now
        match message:
            case Ready():
                self._admit(name, worker, message)
            case WorkerLost():
                yield from self._replace(name, message)
            case Refused():
                raise (InputError if message.exit_status == 2 else RunError)(message.reason)
            case TaskEnded():
                yield from self._requeue(worker, WorkerLost(f"{name} left it unfinished"))
            case StepDone() | Evaluating():
                if worker.is_stepping:
                    worker.longest_silence = max(worker.longest_silence, now - before)
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

    def _admit(self, name: str, worker: _Worker, ready: Ready) -> None:
        """Accept a worker that has the driver's versions and sees the driver's files."""
        for package, version in self._versions.items():
            if ready.versions.get(package) != version:
                raise InputError(
                    f"{name} has {package} {ready.versions.get(package, 'of unknown version')}, this process {version}: "
                    "install the same version on every machine"
                )
        if not ready.sees_folder:
            raise InputError(
                f"{name} does not see the run folder that this process writes to: give an --out on a disk that all machines share"
            )
        worker.is_ready = self._any_was_ready = True

    def _replace(self, name: str, lost: WorkerLost) -> Iterator[TrialOutcome]:
        """Remove a worker that is lost; another starts for its trials."""
        worker = self._remove(name)
        if not worker.is_ready:
            self._failed_starts += 1
            if not self._any_was_ready and self._failed_starts > self._size:
                raise RunError(f"no worker could start (the last: {lost.reason})")
        self._listener.on_event(Notice(text=f"{name} was lost: {lost.reason}"))
        yield from self._requeue(worker, lost)

    def _requeue(self, worker: _Worker, lost: WorkerLost) -> Iterator[TrialOutcome]:
        """The worker has no task any more; each trial of it without an outcome is queued as a task of its own.

        One that has lost `MAX_LOSSES` workers without getting further fails. Workers that were lost with their machine do not count: no
        training does that.
        """
        task, trials = worker.task, list(worker.remaining.values())
        worker.task, worker.remaining = None, {}
        for trial in trials:
            assert task is not None
            losses, step = self._losses.get(trial.trial_id, (0, 0))
            losses = (0 if worker.step > step else losses) + (not lost.with_machine)
            self._losses[trial.trial_id] = losses, max(step, worker.step)
            if losses < MAX_LOSSES:
                self._queue.appendleft(Task(trials=[trial], base_loss=task.base_loss))
            else:
                self._unfinished -= 1
                memory = "; the system kills processes when memory is short" if lost.killed else ""
                reason = f"{trial.arm.label()} lost {MAX_LOSSES} workers (the last: {lost.reason}){memory}"
                kind: Literal["out_of_memory", "error"] = "out_of_memory" if lost.killed else "error"
                yield TrialFailed(**trial.fields, error=kind, reason=reason)

    def _replace_hung_workers(self) -> Iterator[TrialOutcome]:
        """End workers that are silent for longer than `HANG_SECONDS` and than 20 times their longest silence so far."""
        now = self._clock()
        for name, worker in list(self._workers.items()):
            factor = 1 if worker.is_stepping else STARTUP_FACTOR
            limit = max(factor * self._hang_seconds, 20 * worker.longest_silence)
            silence = now - worker.last_message
            if (worker.task is not None or not worker.is_ready) and silence > limit:
                yield from self._replace(name, WorkerLost(f"no message for {silence:.0f} s"))

    def _stop_workers(self) -> Iterator[TrialOutcome]:
        """Ask the workers to stop with checkpoints, yield what still ends within the grace period, and end the others."""
        self._queue.clear()
        for name in self.busy():
            self._crew.send(name, Stop())
        until = self._clock() + GRACE_SECONDS
        while self.busy() and self._clock() < until:
            yield from self._read_messages()
        for name in self.busy():
            self._remove(name)
        self._queue.clear()  # stopped trials were queued again
        self._losses.clear()

    def _remove(self, name: str) -> _Worker:
        self._crew.end(name)
        return self._workers.pop(name)
