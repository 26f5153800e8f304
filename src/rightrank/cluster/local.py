"""Workers as processes on this machine, one loky executor of one process for each (extra `rightrank[workers]`).

With CUDA devices, each worker sees one of them. What a worker prints is in a log file in the run folder.
"""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future
from typing import TYPE_CHECKING

from rightrank.cluster.worker import Task, Worker, WorkerSetup
from rightrank.schema.errors import RightrankError

if TYPE_CHECKING:
    from loky import ProcessPoolExecutor

# An idle worker ends after this time and starts again on demand. So workers whose driver was killed end too.
IDLE_SECONDS = 60.0

_worker: Worker | None = None  # of this process, if it is a worker


class LocalWorker:
    """A worker in a process of its own."""

    def __init__(self, executor: ProcessPoolExecutor) -> None:
        self._executor = executor

    def submit(self, task: Task) -> Future[RightrankError | None]:
        future: Future[RightrankError | None] = self._executor.submit(_run_task, task)
        return future

    def end(self) -> None:
        self._executor.shutdown(wait=True, kill_workers=True)

    def close(self) -> None:
        self._executor.shutdown(wait=True)


class LocalBackend:
    """The workers of this machine."""

    def __init__(self, setup: WorkerSetup, size: int, on_cuda: bool) -> None:
        self._setup, self.size = setup, size
        self._devices = _list_devices() if on_cuda else []

    def start(self, name: str, slot: int) -> LocalWorker:
        from loky import ProcessPoolExecutor

        environment = {"LOKY_MAX_MEMORY_LEAK_SIZE": "1e18"}  # The memory of a worker grows as it loads its base.
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices[slot % len(self._devices)]
        arguments = self._setup, name
        return LocalWorker(
            ProcessPoolExecutor(1, timeout=IDLE_SECONDS, initializer=_start_worker, initargs=arguments, env=environment)
        )

    def require_alive(self) -> None:
        """Do nothing: this machine is alive."""

    def close(self) -> None:
        """Do nothing: the workers are all there is."""


def _list_devices() -> list[str]:
    import torch

    visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible_devices.split(",") if visible_devices else list(map(str, range(torch.cuda.device_count())))


def _start_worker(setup: WorkerSetup, name: str) -> None:
    """Make this process a worker, whose output goes to its log."""
    global _worker
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # The driver handles them and then stops its workers.
    log = os.open(setup.messages / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    _worker = Worker(setup, name)


def _run_task(task: Task) -> RightrankError | None:
    assert _worker is not None
    return _worker.run_task(task)
