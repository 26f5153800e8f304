"""A worker that sleeps instead of training: `steps` milliseconds for each trial."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rightrank.plugins.cluster.on_ray import RayWorker
from rightrank.plugins.cluster.worker import Worker, WorkerMessage, WorkerSetup
from rightrank.schema.trials import Trial, TrialOutcome, TrialStarted
from tests.plugins.cluster.simulated import make_result, make_step

if TYPE_CHECKING:
    from rightrank.runs.selection import Executor

SIGN_SECONDS = 0.2  # between two signs of progress


class StubWorker(Worker):
    """A worker with the real protocol and queue; only the training is replaced."""

    def make_executor(self, setup: WorkerSetup) -> Executor:
        return StubExecutor(self._send)


class StubExecutor:
    def __init__(self, send: Callable[[WorkerMessage], None]) -> None:
        self._send = send

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        for trial in trials:
            self._send(TrialStarted(trial_id=trial.trial_id, **trial.arm.model_dump()))
            until = time.monotonic() + trial.arm.steps / 1000
            while (seconds_left := until - time.monotonic()) > 0:
                time.sleep(min(seconds_left, SIGN_SECONDS))
                if seconds_left > SIGN_SECONDS:
                    self._send(make_step(trial))
            yield make_result(trial)


class StubRayWorker(RayWorker):
    make_executor = StubWorker.make_executor
