"""Trials spread over workers: who runs what, what is handed out again when a worker is lost, each outcome once.

The pool knows nothing of processes or clusters; a crew does. It is plain code on one thread, driven by the crew's news,
so it runs in simulated time as in real time.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from rightrank.errors import InputError, InterruptedRun, RunError
from rightrank.executors.messages import Notice, Ready, Refused, Step, Task, TaskEnded, WorkerMessage
from rightrank.records import Trial, TrialFailed, TrialOutcome, TrialStarted
from rightrank.records.observer import Observer

MAX_LOSSES = 3  # workers that a trial may lose before it counts as failed
BEFORE_STEPS = 6  # times as long a silence is let pass while a worker loads, prepares or evaluates the base
POLL_SECONDS = 1.0
GRACE_SECONDS = 25.0  # for a worker that was asked to stop


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker that is gone."""

    reason: str
    killed: bool = False  # by a signal that it could not answer, as the system does when memory is short


class Crew(Protocol):
    """Workers of one kind. Names are the pool's; a name that was lost or ended is not used again."""

    def start(self, worker: str) -> None:
        """Begin a worker; its `Ready` or its `WorkerLost` comes as news."""
        ...

    def assign(self, worker: str, task: Task) -> None: ...

    def request_stop(self, worker: str) -> None:
        """It leaves its task at the next step, with checkpoints, and tells `TaskEnded`."""
        ...

    def end(self, worker: str) -> None:
        """At once, whatever it does. No news comes from it afterwards."""
        ...

    def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]:
        """What was told since, after waiting at most so long for something."""
        ...

    def close(self) -> None:
        """End all."""
        ...


Outcome: TypeAlias = tuple[str, TrialOutcome]  # the job and how a trial of it ended


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """What the pool is told of its work."""

    workers: int
    versions: dict[str, str]
    token: str  # what the probe in the shared folder holds
    task_trials: int = 1  # trials of a task at most
    hang_seconds: float = 600.0


@dataclass(slots=True)
class _Member:
    """A worker as the pool sees it."""

    is_ready: bool = False
    task: Task | None = None
    left: dict[str, Trial] = field(default_factory=dict)  # of its task, not yet ended
    heard: float = 0.0
    is_stepping: bool = False  # told of a step of its task
    longest_silence: float = 0.0  # between two steps


class Pool:
    """Submit trials, take outcomes as they come, cancel; every trial that was submitted ends in one outcome."""

    def __init__(
        self,
        crew: Crew,
        options: PoolOptions,
        observer: Observer | None = None,
        job_observers: Mapping[str, Observer] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._crew = crew
        self._options = options
        self._observer = observer or Observer()
        self._job_observers = job_observers or {}  # of the events of one job, where they differ
        self._clock = clock
        self._members: dict[str, _Member] = {}
        self._idle: list[str] = []
        self._waiting: deque[Task] = deque()
        self._unheard: deque[tuple[str, WorkerMessage | WorkerLost]] = deque()
        self._open: dict[str, Counter[str]] = {}  # job → trials without an outcome
        self._losses: Counter[str] = Counter()  # trial → workers lost with it
        self._started = 0
        self._tasks = 0
        self._failed_starts = 0
        self._ready_once = False

    def submit(self, job: str, trials: Sequence[Trial], base_loss: float | None) -> None:
        """Queue trials; the longest first, since what is long and late is what all wait for."""
        self._open.setdefault(job, Counter()).update(trial.trial_id for trial in trials)
        ordered = sorted(trials, key=lambda trial: -trial.arm.steps)
        # Even shares, none above the most that train together.
        size = max(1, min(self._options.task_trials, -(-len(ordered) // self._options.workers)))
        for start in range(0, len(ordered), size):
            self._waiting.append(self._task(job, ordered[start : start + size], base_loss))

    def drop(self, job: str) -> None:
        """Want no more of a job; what runs of it ends unheard."""
        self._open.pop(job, None)
        self._waiting = deque(task for task in self._waiting if task.job != job)

    def is_waiting(self, job: str) -> bool:
        """Whether trials of the job are still without an outcome."""
        return bool(self._open.get(job))

    def busy(self) -> list[str]:
        """The workers that have a task."""
        return [name for name, member in self._members.items() if member.task is not None]

    def outcomes(self) -> Iterator[Outcome]:
        """Outcomes as they come, until nothing is under way; more may be submitted meanwhile. Closed early, it cancels.

        Raises:
            InterruptedRun: asked to stop; the workers left checkpoints.
            InputError, RunError: no worker can do this, with the reason.
        """
        try:
            while any(self._open.values()):
                self._fill()
                yield from self._hear_all()
                yield from self._silent()
                if self._observer.should_stop():
                    yield from self._wind_down()
                    raise InterruptedRun(f"stopped with {sum(map(len, self._open.values()))} trainings to do")
        finally:
            if any(self._open.values()):
                self.cancel()

    def cancel(self) -> None:
        """Drop what waits and what runs; a worker that does not stop is ended."""
        self._open.clear()
        list(self._wind_down())

    def _wind_down(self) -> Iterator[Outcome]:
        """Let the workers stop at their next step, with checkpoints; what ends meanwhile still counts."""
        self._waiting.clear()
        busy = self.busy()
        for name in busy:
            self._crew.request_stop(name)
        until = self._clock() + GRACE_SECONDS
        while any(map(self._is_busy, busy)) and self._clock() < until:
            yield from self._hear_all()
        for name in filter(self._is_busy, busy):
            self._remove(name)
        self._waiting.clear()  # what was handed out again by those that stopped
        self._losses.clear()

    def close(self) -> None:
        self._crew.close()
        self._members.clear()
        self._idle.clear()

    def _task(self, job: str, trials: Sequence[Trial], base_loss: float | None) -> Task:
        self._tasks += 1
        return Task(number=self._tasks, job=job, trials=list(trials), base_loss=base_loss)

    def _is_busy(self, worker: str) -> bool:
        return worker in self._members and self._members[worker].task is not None

    def _fill(self) -> None:
        """Workers for what waits, and tasks for those that are free."""
        wanted = min(self._options.workers, len(self._waiting) + len(self.busy()))
        while len(self._members) < wanted:
            self._started += 1
            name = f"worker-{self._started}"
            self._members[name] = _Member(heard=self._clock())
            self._crew.start(name)
        while self._waiting and self._idle:
            name, task = self._idle.pop(0), self._waiting.popleft()
            member = self._members[name]
            member.task, member.heard, member.is_stepping = task, self._clock(), False
            member.left = {trial.trial_id: trial for trial in task.trials}
            self._crew.assign(name, task)

    def _hear_all(self) -> Iterator[Outcome]:
        """What was told since. Whoever takes outcomes may leave after any: the rest is then heard the next time."""
        if not self._unheard:
            self._unheard.extend(self._crew.messages(POLL_SECONDS))
        while self._unheard:
            yield from self._hear(*self._unheard.popleft())

    def _hear(self, worker: str, news: WorkerMessage | WorkerLost) -> Iterator[Outcome]:
        member = self._members.get(worker)
        if member is None:
            return  # given up before: what it was doing is someone else's now
        now, before = self._clock(), member.heard
        member.heard = now
        match news:
            case Ready():
                self._admit(worker, member, news)
            case WorkerLost():
                self._remove(worker)
                yield from self._after_loss(worker, member, news)
            case Refused():
                raise (InputError if news.exit_status == 2 else RunError)(news.reason)
            case TaskEnded():
                yield from self._free(worker, member)
            case Step():
                if member.is_stepping:
                    member.longest_silence = max(member.longest_silence, now - before)
                member.is_stepping = True
                self._observer_of(member).on_event(news.event)
            case Notice():
                self._observer.notice(news.text)
            case TrialStarted():
                if member.task is not None and news.trial_id in member.left:
                    self._observer_of(member).on_event(news)
            case _:
                yield from self._take(member, news)

    def _observer_of(self, member: _Member) -> Observer:
        return self._observer if member.task is None else self._job_observers.get(member.task.job, self._observer)

    def _admit(self, worker: str, member: _Member, ready: Ready) -> None:
        """Let a worker in, if it is of the same make and sees the same folder."""
        differing = [name for name, own in self._options.versions.items() if ready.versions.get(name) != own]
        if differing:
            name = differing[0]
            raise InputError(
                f"{worker} has {name} {ready.versions.get(name, 'of no known version')}, this process "
                f"{self._options.versions[name]}: install the same on every machine"
            )
        if ready.token != self._options.token:
            raise InputError(
                f"{worker} does not see the run folder that this process writes to: give an --out on a disk that all machines share"
            )
        member.is_ready = True
        self._ready_once = True
        self._idle.append(worker)

    def _take(self, member: _Member, outcome: TrialOutcome) -> Iterator[Outcome]:
        """An outcome, if its trial is still without one."""
        if member.task is None or member.left.pop(outcome.trial_id, None) is None:
            return
        yield from self._settle(member.task.job, outcome)

    def _settle(self, job: str, outcome: TrialOutcome) -> Iterator[Outcome]:
        if self._open.get(job, Counter()).pop(outcome.trial_id, None) is not None:
            yield job, outcome

    def _free(self, worker: str, member: _Member) -> Iterator[Outcome]:
        task, left = member.task, list(member.left.values())
        member.task, member.left = None, {}
        self._idle.append(worker)
        if task is not None and left:
            yield from self._again(task, left, WorkerLost(f"{worker} left it unfinished"))

    def _after_loss(self, worker: str, member: _Member, lost: WorkerLost) -> Iterator[Outcome]:
        if not member.is_ready:
            self._failed_starts += 1
            if not self._ready_once and self._failed_starts > self._options.workers:
                raise RunError(f"no worker could start (the last: {lost.reason})")
        self._observer.notice(f"{worker} is gone: {lost.reason}")
        if member.task is not None:
            yield from self._again(member.task, list(member.left.values()), lost)

    def _again(self, task: Task, left: Sequence[Trial], lost: WorkerLost) -> Iterator[Outcome]:
        """Hand trials out again, each alone; one that was lost too often has failed."""
        for trial in left:
            self._losses[trial.trial_id] += 1
            if trial.trial_id not in self._open.get(task.job, ()):
                continue
            if self._losses[trial.trial_id] < MAX_LOSSES:
                self._waiting.appendleft(self._task(task.job, [trial], task.base_loss))
                continue
            yield from self._settle(task.job, failed_after_losses(trial, lost))

    def _silent(self) -> Iterator[Outcome]:
        """Workers that hang: at work and without a word for longer than they ever were."""
        now = self._clock()
        for name, member in list(self._members.items()):
            patience = 1 if member.is_stepping else BEFORE_STEPS
            limit = max(patience * self._options.hang_seconds, 20 * member.longest_silence)
            if (member.task is not None or not member.is_ready) and now - member.heard > limit:
                self._remove(name)
                yield from self._after_loss(name, member, WorkerLost(f"no word for {now - member.heard:.0f} s"))

    def _remove(self, worker: str) -> None:
        self._crew.end(worker)
        del self._members[worker]
        if worker in self._idle:
            self._idle.remove(worker)


def failed_after_losses(trial: Trial, lost: WorkerLost) -> TrialFailed:
    """The outcome of a trial that one worker after another was lost with."""
    memory = "; the system ends processes so when memory is short" if lost.killed else ""
    return TrialFailed(
        trial_id=trial.trial_id,
        **trial.arm.model_dump(),
        error="out_of_memory" if lost.killed else "error",
        reason=f"{trial.arm.label()} lost {MAX_LOSSES} workers (the last: {lost.reason}){memory}",
    )


class PoolExecutor:
    """The pool as the executor of one selection."""

    def __init__(self, pool: Pool, job: str) -> None:
        self._pool = pool
        self._job = job

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        self._pool.submit(self._job, trials, base_loss)
        for _, outcome in self._pool.outcomes():
            yield outcome
