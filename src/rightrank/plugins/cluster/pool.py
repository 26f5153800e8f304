"""Distributes trials over workers, requeues the trials of lost workers, and yields each outcome exactly once.

The pool knows neither processes nor clusters: a `Crew` does. It runs on one thread and reads the time from an
injected clock, so tests drive it in simulated time.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Protocol, TypeAlias

from pydantic import Field, JsonValue, TypeAdapter

from rightrank.schema.errors import InputError, InterruptedRun, RunError
from rightrank.schema.events import Listener, Notice, Preparing, StepDone
from rightrank.schema.trials import (
    Record,
    Trial,
    TrialCollapsed,
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialOutcome,
    TrialStarted,
)


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker ended without being asked to."""

    reason: str
    killed: bool = False  # by SIGKILL, as the system does when memory is short


class Crew(Protocol):
    """Starts, reaches and ends workers of one kind: local processes, Ray actors, or a simulation.

    An implementation must keep these rules:

    - The pool chooses the workers' names and never reuses one.
    - All methods are called from one thread. `start`, `assign` and `request_stop` return at once: while they block,
      the pool sees neither hangs nor the user's request to stop.
    - After `start(w)`, the first message of `w` is `Ready`, `Refused` or `WorkerLost`.
    - Messages of one worker arrive in the order in which it sent them, none twice.
    - When a worker ends by itself, `messages` reports one `WorkerLost`, after everything that it sent, and nothing
      of that worker afterwards.
    - `assign` and `request_stop` never raise for a worker that has just ended; its `WorkerLost` follows.
    - After `end(w)` the worker holds no memory or device. Late messages of `w` are allowed: the pool ignores them.

    For example, workers in this process, for tests (each `assign` blocks until its task has ended):

        class InlineCrew:
            def __init__(self, setup: WorkerSetup) -> None:
                self._setup, self._workers, self._sent = setup, {}, []

            def start(self, worker: str) -> None:
                self._workers[worker] = Worker(lambda message: self._sent.append((worker, message)))
                self._workers[worker].set_up(self._setup)

            def assign(self, worker: str, task: Task) -> None:
                self._workers[worker].run_task(task)

            def request_stop(self, worker: str) -> None:
                self._workers[worker].stop()

            def end(self, worker: str) -> None:
                self._workers.pop(worker).close()

            def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]:
                sent, self._sent = self._sent, []
                return sent

            def close(self) -> None:
                for worker in list(self._workers):
                    self.end(worker)
    """

    def start(self, worker: str) -> None:
        """Start a worker and send it its `WorkerSetup`; return without waiting for it to be ready."""
        ...

    def assign(self, worker: str, task: Task) -> None:
        """Send a task to an idle worker."""
        ...

    def request_stop(self, worker: str) -> None:
        """Ask the worker to stop its task at the next step, save checkpoints, and send `TaskEnded`."""
        ...

    def end(self, worker: str) -> None:
        """End the worker at once, whatever it is doing."""
        ...

    def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]:
        """`(worker, message)` for everything that has arrived; wait at most `seconds` for the first."""
        ...

    def close(self) -> None:
        """End all workers and release what the crew holds."""
        ...


class Job(Record):
    """One selection. Workers prepare the same request as the driver and must compute the same fingerprint."""

    name: str
    model: str
    data: str
    settings: dict[str, JsonValue]  # with the ranks that the driver settled
    folder: Path  # the run folder, shared by driver and workers
    fingerprint: str
    begun: dict[str, JsonValue] | None = None  # see `Request`


class Task(Record):
    """Trials of one job for one worker, which trains several of them in one pass where that is faster."""

    type: Literal["task"] = "task"
    number: int
    job: str
    trials: list[Trial]
    base_loss: float | None


class Group(Record):
    """The place of a process in a worker that consists of several processes."""

    name: str  # of the worker
    number: int  # of the process; only process 0 sends messages
    size: int
    host: str  # of the rendezvous store
    port: int
    backend: str  # of torch.distributed


class WorkerSetup(Record):
    type: Literal["orders"] = "orders"
    jobs: list[Job]
    working_folder: Path  # relative paths start here
    share: str  # the run folder or the store's address
    probe: str  # name of a file that the driver wrote there
    group: Group | None = None  # None: the worker is one process


class Stop(Record):
    """Stop the current task at the next step and save checkpoints."""

    type: Literal["stop"] = "stop"


class Ready(Record):
    type: Literal["ready"] = "ready"
    versions: dict[str, str]
    token: str | None  # content of the probe file; None: the worker does not see the file


class TaskEnded(Record):
    """The worker is idle: every trial of the task has an outcome, or the worker was stopped."""

    type: Literal["task_ended"] = "task_ended"
    number: int


class Refused(Record):
    """The worker can't run the job, and no other worker could; `reason` is for the user."""

    type: Literal["refused"] = "refused"
    reason: str
    exit_status: int


class Step(Record):
    """Progress, and the sign that the worker is alive."""

    type: Literal["step"] = "step"
    event: StepDone | Preparing


Command: TypeAlias = Annotated[WorkerSetup | Task | Stop, Field(discriminator="type")]
WorkerMessage: TypeAlias = Annotated[
    Ready
    | TaskEnded
    | Refused
    | Notice
    | Step
    | TrialStarted
    | TrialFinished
    | TrialCollapsed
    | TrialDiverged
    | TrialFailed,
    Field(discriminator="type"),
]
COMMAND: TypeAdapter[Command] = TypeAdapter(Command)
WORKER_MESSAGE: TypeAdapter[WorkerMessage] = TypeAdapter(WorkerMessage)


MAX_LOSSES = 3  # workers that a trial may lose before it counts as failed
STARTUP_FACTOR = 6  # longer silence is allowed while a worker loads, prepares or evaluates the base
POLL_SECONDS = 1.0
GRACE_SECONDS = 25.0  # for a worker to stop on request


Outcome: TypeAlias = tuple[str, TrialOutcome]  # the job and the outcome of one of its trials


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """Size and limits of a pool, and what its workers must match."""

    workers: int  # at most
    versions: dict[str, str]  # of every package that must be the same everywhere
    token: str  # content of the probe file in the shared folder
    task_trials: int = 1  # trials per task, at most
    hang_seconds: float = 600.0  # without a message: the worker is replaced


@dataclass(slots=True)
class _WorkerState:
    is_ready: bool = False
    task: Task | None = None
    remaining: dict[str, Trial] = field(default_factory=dict)  # trials of the task without an outcome
    last_message: float = 0.0  # when it arrived, or when the task was assigned
    is_stepping: bool = False  # has reported a step of its task
    longest_silence: float = 0.0  # seconds between two messages while stepping


class Pool:
    """Takes trials with `submit` and yields exactly one outcome for each from `outcomes`."""

    def __init__(
        self,
        crew: Crew,
        options: PoolOptions,
        listener: Listener | None = None,
        job_listeners: Mapping[str, Listener] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._crew = crew
        self._options = options
        self._listener = listener or Listener()
        self._job_listeners = job_listeners or {}  # of the events of one job, where they differ
        self._clock = clock
        self._workers: dict[str, _WorkerState] = {}
        self._idle: list[str] = []
        self._queue: deque[Task] = deque()
        self._unread: deque[tuple[str, WorkerMessage | WorkerLost]] = deque()
        self._unfinished: dict[str, Counter[str]] = {}  # job → trials without an outcome
        self._losses: Counter[str] = Counter()  # trial → workers lost while they trained it
        self._started = 0
        self._tasks = 0
        self._failed_starts = 0
        self._any_was_ready = False

    def submit(self, job: str, trials: Sequence[Trial], base_loss: float | None) -> None:
        """Queue trials, the longest first: a long trial that starts last would delay the end."""
        self._unfinished.setdefault(job, Counter()).update(trial.trial_id for trial in trials)
        ordered = sorted(trials, key=lambda trial: -trial.arm.steps)
        # An even share for each worker, at most `task_trials`.
        size = max(1, min(self._options.task_trials, -(-len(ordered) // self._options.workers)))
        for start in range(0, len(ordered), size):
            self._queue.append(self._task(job, ordered[start : start + size], base_loss))

    def is_waiting(self, job: str) -> bool:
        """Whether trials of the job are still without an outcome."""
        return bool(self._unfinished.get(job))

    def busy(self) -> list[str]:
        return [name for name, worker in self._workers.items() if worker.task is not None]

    def outcomes(self) -> Iterator[Outcome]:
        """Yield outcomes as trials end, until no trial is unfinished; `submit` may be called in between.

        Closing the iterator early cancels what is left.

        Raises:
            InterruptedRun: `should_stop` returned True; the workers have saved checkpoints.
            InputError, RunError: no worker can run the job; the message states why.
        """
        try:
            while any(self._unfinished.values()):
                self._assign_tasks()
                yield from self._read_messages()
                yield from self._replace_hung_workers()
                if self._listener.should_stop():
                    yield from self._stop_workers()
                    raise InterruptedRun(f"stopped with {sum(map(len, self._unfinished.values()))} trainings to do")
        finally:
            if any(self._unfinished.values()):
                self.cancel()

    def cancel(self) -> None:
        """Remove what is queued and stop what runs; a worker that does not stop in time is ended."""
        self._unfinished.clear()
        list(self._stop_workers())

    def close(self) -> None:
        self._crew.close()
        self._workers.clear()
        self._idle.clear()

    def _stop_workers(self) -> Iterator[Outcome]:
        """Ask the workers to stop with checkpoints, and yield what still ends within the grace period."""
        self._queue.clear()
        busy = self.busy()
        for name in busy:
            self._crew.request_stop(name)
        until = self._clock() + GRACE_SECONDS
        while any(map(self._is_busy, busy)) and self._clock() < until:
            yield from self._read_messages()
        for name in filter(self._is_busy, busy):
            self._remove(name)
        self._queue.clear()  # stopped trials were queued again
        self._losses.clear()

    def _task(self, job: str, trials: Sequence[Trial], base_loss: float | None) -> Task:
        self._tasks += 1
        return Task(number=self._tasks, job=job, trials=list(trials), base_loss=base_loss)

    def _is_busy(self, name: str) -> bool:
        return name in self._workers and self._workers[name].task is not None

    def _assign_tasks(self) -> None:
        """Start workers for the queue and assign tasks to idle ones."""
        wanted = min(self._options.workers, len(self._queue) + len(self.busy()))
        while len(self._workers) < wanted:
            self._started += 1
            name = f"worker-{self._started}"
            self._workers[name] = _WorkerState(last_message=self._clock())
            self._crew.start(name)
        while self._queue and self._idle:
            name, task = self._idle.pop(0), self._queue.popleft()
            worker = self._workers[name]
            worker.task, worker.last_message, worker.is_stepping = task, self._clock(), False
            worker.remaining = {trial.trial_id: trial for trial in task.trials}
            self._crew.assign(name, task)

    def _read_messages(self) -> Iterator[Outcome]:
        """Handle what has arrived. If the caller stops iterating, the next call handles the rest."""
        if not self._unread:
            self._unread.extend(self._crew.messages(POLL_SECONDS))
        while self._unread:
            yield from self._handle(*self._unread.popleft())

    def _handle(self, name: str, message: WorkerMessage | WorkerLost) -> Iterator[Outcome]:
        worker = self._workers.get(name)
        if worker is None:
            return  # removed before; its trials are queued or assigned elsewhere
        now, before = self._clock(), worker.last_message
        worker.last_message = now
        match message:
            case Ready():
                self._admit(name, worker, message)
            case WorkerLost():
                self._remove(name)
                yield from self._requeue_lost(name, worker, message)
            case Refused():
                raise (InputError if message.exit_status == 2 else RunError)(message.reason)
            case TaskEnded():
                yield from self._release(name, worker)
            case Step():
                if worker.is_stepping:
                    worker.longest_silence = max(worker.longest_silence, now - before)
                worker.is_stepping = True
                self._listener_of(worker).on_event(message.event)
            case Notice():
                self._listener.on_event(message)
            case TrialStarted():
                if worker.task is not None and message.trial_id in worker.remaining:
                    self._listener_of(worker).on_event(message)
            case _:
                if worker.task is not None and worker.remaining.pop(message.trial_id, None) is not None:
                    yield from self._resolve(worker.task.job, message)

    def _listener_of(self, worker: _WorkerState) -> Listener:
        return self._listener if worker.task is None else self._job_listeners.get(worker.task.job, self._listener)

    def _admit(self, name: str, worker: _WorkerState, ready: Ready) -> None:
        """Accept a worker that has the driver's versions and sees the driver's files."""
        for package, version in self._options.versions.items():
            if ready.versions.get(package) != version:
                raise InputError(
                    f"{name} has {package} {ready.versions.get(package, 'of unknown version')}, this process {version}: "
                    "install the same version on every machine"
                )
        if ready.token != self._options.token:
            raise InputError(
                f"{name} does not see the run folder that this process writes to: give an --out on a disk that all machines share"
            )
        worker.is_ready = self._any_was_ready = True
        self._idle.append(name)

    def _resolve(self, job: str, outcome: TrialOutcome) -> Iterator[Outcome]:
        """Yield the outcome unless its trial already has one or its job was dropped."""
        if self._unfinished.get(job, Counter()).pop(outcome.trial_id, None) is not None:
            yield job, outcome

    def _release(self, name: str, worker: _WorkerState) -> Iterator[Outcome]:
        task, remaining = worker.task, list(worker.remaining.values())
        worker.task, worker.remaining = None, {}
        self._idle.append(name)
        if task is not None and remaining:
            yield from self._requeue(task, remaining, WorkerLost(f"{name} left it unfinished"))

    def _requeue_lost(self, name: str, worker: _WorkerState, lost: WorkerLost) -> Iterator[Outcome]:
        if not worker.is_ready:
            self._failed_starts += 1
            if not self._any_was_ready and self._failed_starts > self._options.workers:
                raise RunError(f"no worker could start (the last: {lost.reason})")
        self._listener.on_event(Notice(text=f"{name} was lost: {lost.reason}"))
        if worker.task is not None:
            yield from self._requeue(worker.task, list(worker.remaining.values()), lost)

    def _requeue(self, task: Task, trials: Sequence[Trial], lost: WorkerLost) -> Iterator[Outcome]:
        """Queue each trial as a task of its own; a trial that has lost `MAX_LOSSES` workers fails."""
        for trial in trials:
            self._losses[trial.trial_id] += 1
            if trial.trial_id not in self._unfinished.get(task.job, ()):
                continue
            if self._losses[trial.trial_id] < MAX_LOSSES:
                self._queue.appendleft(self._task(task.job, [trial], task.base_loss))
            else:
                yield from self._resolve(task.job, failed_after_losses(trial, lost))

    def _replace_hung_workers(self) -> Iterator[Outcome]:
        """End workers that are silent for longer than `hang_seconds` and than 20 times their longest silence so far."""
        now = self._clock()
        for name, worker in list(self._workers.items()):
            factor = 1 if worker.is_stepping else STARTUP_FACTOR
            limit = max(factor * self._options.hang_seconds, 20 * worker.longest_silence)
            silence = now - worker.last_message
            if (worker.task is not None or not worker.is_ready) and silence > limit:
                self._remove(name)
                yield from self._requeue_lost(name, worker, WorkerLost(f"no message for {silence:.0f} s"))

    def _remove(self, name: str) -> None:
        self._crew.end(name)
        del self._workers[name]
        if name in self._idle:
            self._idle.remove(name)


def failed_after_losses(trial: Trial, lost: WorkerLost) -> TrialFailed:
    """The outcome of a trial that has lost `MAX_LOSSES` workers."""
    memory = "; the system kills processes when memory is short" if lost.killed else ""
    return TrialFailed(
        **trial.fields,
        error="out_of_memory" if lost.killed else "error",
        reason=f"{trial.arm.label()} lost {MAX_LOSSES} workers (the last: {lost.reason}){memory}",
    )


class PoolExecutor:
    """A pool as the `Executor` of one job."""

    def __init__(self, pool: Pool, job: str) -> None:
        self._pool = pool
        self._job = job

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        self._pool.submit(self._job, trials, base_loss)
        for _, outcome in self._pool.outcomes():
            yield outcome
