"""A worker that sleeps where a real one trains: `steps` milliseconds for each trial."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rightrank.plugins.cluster.on_ray import RayWorker
from rightrank.plugins.cluster.worker import Setup, Worker, WorkerMessage
from rightrank.schema.trials import Trial, TrialOutcome, TrialStarted
from tests.plugins.cluster.simulated import result_of, step_of

if TYPE_CHECKING:
    from rightrank.runs.executor import Executor

SIGN_SECONDS = 0.2  # between two signs of progress


class StubWorker(Worker):
    """A worker with the real protocol and queue; only the training is replaced."""

    def make_executor(self, setup: Setup) -> Executor:
        return StubExecutor(self._send)


class StubExecutor:
    def __init__(self, send: Callable[[WorkerMessage], None]) -> None:
        self._send = send

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        for trial in trials:
            self._send(TrialStarted(trial_id=trial.trial_id, **trial.arm.model_dump()))
            until = time.monotonic() + trial.arm.steps / 1000
            while (left := until - time.monotonic()) > 0:
                time.sleep(min(left, SIGN_SECONDS))
                if left > SIGN_SECONDS:
                    self._send(step_of(trial))
            yield result_of(trial)


class StubRayWorker(RayWorker):
    make_executor = StubWorker.make_executor
