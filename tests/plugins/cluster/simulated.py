"""Workers in simulated time, under the very pool that real ones work for: only the seconds are not waited for."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from rightrank.plugins.cluster.worker import Ready, Stop, Task, TaskEnded, WorkerLost, WorkerMessage
from rightrank.schema.events import StepDone
from rightrank.schema.trials import Trial, TrialFinished, TrialStarted
from tests.tiny import UNMEASURED

VERSIONS = {"rightrank": "simulated"}


@dataclass(frozen=True, slots=True)
class Pace:
    """How long things take, in seconds."""

    trial: Callable[[str, Trial], float]  # by worker and trial
    start: float = 0.0  # of a worker, before it is ready
    hand_over: float = 0.0  # from one trial to the next
    step: float = 30.0  # between two signs of progress


class SimulatedCrew:
    """A crew whose clock jumps to what comes next.

    `ends_at` says when a worker dies by itself (None: never), `hangs_at` from when it says nothing more. A worker
    that is ended still reports where `is_deaf`, as one behind a broken network would.
    """

    def __init__(
        self,
        pace: Pace,
        ends_at: Callable[[str], float | None] = lambda _: None,
        hangs_at: Callable[[str], float | None] = lambda _: None,
        is_deaf: bool = False,
    ) -> None:
        self._pace = pace
        self._ends_at = ends_at
        self._hangs_at = hangs_at
        self._is_deaf = is_deaf
        self._events: list[tuple[float, int, str, WorkerMessage | WorkerLost]] = []
        self._order = count()
        self._begun: dict[str, float] = {}
        self._gone: set[str] = set()
        self.now = 0.0
        self.busy_seconds = 0.0
        self.trained: list[str] = []  # trial ids, as often as each was begun

    def clock(self) -> float:
        return self.now

    def start(self, worker: str) -> None:
        self._begun[worker] = self.now
        self._plan(self.now + self._pace.start, worker, Ready(versions=VERSIONS, sees_folder=True))
        end = self._ends_at(worker)
        if end is not None:
            self._plan(self.now + end, worker, WorkerLost("killed by signal 9", killed=True))

    def send(self, worker: str, command: Task | Stop) -> None:
        if isinstance(command, Task):
            self._train(worker, command)
            return
        self._events = [event for event in self._events if event[2] != worker]
        heapq.heapify(self._events)
        self._plan(self.now, worker, TaskEnded())

    def _train(self, worker: str, task: Task) -> None:
        at = self.now
        for trial in task.trials:
            at += self._pace.hand_over
            self._plan(at, worker, TrialStarted(trial_id=trial.trial_id, **trial.arm.model_dump()))
            seconds = self._pace.trial(worker, trial)
            self.trained.append(trial.trial_id)
            self.busy_seconds += seconds
            done = self._pace.step
            while done < seconds:
                self._plan(at + done, worker, step_of(trial))
                done += self._pace.step
            at += seconds
            self._plan(at, worker, result_of(trial))
        self._plan(at, worker, TaskEnded())

    def end(self, worker: str) -> None:
        if not self._is_deaf:
            self._gone.add(worker)

    def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]:
        until = self.now + seconds
        while self._events and self._events[0][0] <= until:
            self.now, _, worker, news = heapq.heappop(self._events)
            if worker in self._gone or self._is_silent(worker):
                continue
            if isinstance(news, WorkerLost):
                self._gone.add(worker)
            return [(worker, news)]
        self.now = until
        return []

    def close(self) -> None:
        self._events.clear()

    def _plan(self, at: float, worker: str, news: WorkerMessage | WorkerLost) -> None:
        heapq.heappush(self._events, (at, next(self._order), worker, news))

    def _is_silent(self, worker: str) -> bool:
        hang = self._hangs_at(worker)
        return hang is not None and self.now >= self._begun[worker] + hang


def step_of(trial: Trial) -> StepDone:
    return StepDone(trial_id=trial.trial_id, step=1, steps=trial.arm.steps, loss=1.0, seconds=1.0)


def result_of(trial: Trial) -> TrialFinished:
    """The same for the same trial, wherever it was trained."""
    value = 1.0 + 1.0 / (1 + trial.arm.rank) + trial.arm.learning_rate
    return TrialFinished(
        trial_id=trial.trial_id,
        **trial.arm.model_dump(),
        value=value,
        metrics={"loss": value},
        **(
            UNMEASURED
            | {
                "item_losses": [value] * 4,
                "item_tokens": [1] * 4,
                "trainable_parameters": trial.arm.rank,
                "train_seconds": 1.0,
            }
        ),
    )
