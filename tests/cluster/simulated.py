"""Simulate workers in simulated time under the same pool that real ones work for, and make trials and runs for real workers."""

from __future__ import annotations

import heapq
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from rightrank import select_rank
from rightrank.cluster.worker import StopTask, Task, TaskEnded, WorkerLost, WorkerMessage, WorkerReady
from rightrank.runs.journal import Journal
from rightrank.schema.events import StepDone
from rightrank.schema.trials import Arm, Trial, TrialFinished, TrialStarted
from tests.tiny import build_small_settings

VERSIONS = {"rightrank": "simulated"}


@dataclass(frozen=True, slots=True)
class Pace:
    """How long things take, in seconds."""

    trial: Callable[[str, Trial], float]  # by worker and trial
    start: float = 0.0  # of a worker, before it is ready
    hand_over: float = 0.0  # from one trial to the next
    step: float = 30.0  # between two signs of progress


class SimulatedBackend:
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
        self._plan(self.now + self._pace.start, worker, WorkerReady(versions=VERSIONS, sees_folder=True))
        end = self._ends_at(worker)
        if end is not None:
            self._plan(self.now + end, worker, WorkerLost("killed by signal 9", was_killed=True))

    def send(self, worker: str, command: Task | StopTask) -> None:
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
            elapsed = self._pace.step
            while elapsed < seconds:
                self._plan(at + elapsed, worker, make_step(trial))
                elapsed += self._pace.step
            at += seconds
            self._plan(at, worker, make_result(trial))
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


def make_step(trial: Trial) -> StepDone:
    return StepDone(trial_id=trial.trial_id, step=1, steps=trial.arm.steps, loss=1.0, seconds=1.0)


def make_result(trial: Trial) -> TrialFinished:
    """Return the same result for the same trial, on any worker."""
    value = 1.0 + 1.0 / (1 + trial.arm.rank) + trial.arm.learning_rate
    return TrialFinished(
        trial_id=trial.trial_id,
        **trial.arm.model_dump(),
        value=value,
        metrics={"loss": value},
        example_losses=[value] * 4,
        example_tokens=[1] * 4,
        trainable_parameters=trial.arm.rank,
        train_seconds=1.0,
    )


STEPS: dict[str, Any] = {"max_steps": 12, "ranks": (1, 4), "checkpoint_seconds": 0.01}


def make_trials(count: int) -> list[Trial]:
    arms = [Arm(rank=1 + n, learning_rate=1e-3, lora_alpha=32.0, seed=0, steps=10 + n) for n in range(count)]
    return [Trial(trial_id=f"trial-{n:03}", arm=arm) for n, arm in enumerate(arms)]


def read_decision(run: Path) -> dict[str, Any]:
    """Return the decision without the cost of the next run, which is measured."""
    decision = dict(json.loads((run / "decision.json").read_text()))
    return {name: value for name, value in decision.items() if name not in ("next_run", "next_runs")}


def read_values(run: Path) -> dict[str, float]:
    records = Journal(run / "journal.jsonl").read()
    finished = [record for record in records if isinstance(record, TrialFinished)]
    assert len({trial.trial_id for trial in finished}) == len(finished)  # none counted twice
    return {trial.trial_id: trial.value for trial in finished}


def main() -> None:
    """Run a selection on the Ray cluster, in a process that a test can kill: `python -m tests.cluster.simulated MODEL DATA OUT`."""
    model, data, out = sys.argv[1:]
    select_rank(model, data, out, settings=build_small_settings(**STEPS, executor="ray", workers=3))


if __name__ == "__main__":
    main()
