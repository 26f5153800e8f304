"""Run workers as processes on this machine, connected by pipes. Their output is written to log files in the run folder."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rightrank.cluster.worker import StopTask, Task, Worker, WorkerLost, WorkerMessage, WorkerSetup

WORKER = (sys.executable, "-m", "rightrank.cluster.worker")
EXIT_SECONDS = 5.0  # time for a worker to exit after a request


class ProcessBackend:
    """A backend with one process for each worker. With CUDA devices, each worker gets one of them."""

    def __init__(self, setup: WorkerSetup, logs: Path, devices: int = 0, kind: type[Worker] = Worker) -> None:
        self._setup, self._kind = setup, kind
        self._logs = logs
        self._devices = devices  # number of CUDA devices to use
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._pipes: dict[str, Connection[Any, Any]] = {}
        self._device_numbers: dict[str, int] = {}  # by worker
        self._messages: queue.SimpleQueue[tuple[str, WorkerMessage | WorkerLost]] = queue.SimpleQueue()

    def start(self, worker: str) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        device_number = self._device_numbers[worker] = next(
            n for n in count() if n not in self._device_numbers.values()
        )
        variables: dict[str, str] = {}
        if self._devices:  # A worker sees only its own device.
            visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = (
                visible_devices.split(",") if visible_devices else [str(number) for number in range(self._devices)]
            )
            variables = {"CUDA_VISIBLE_DEVICES": devices[device_number % len(devices)]}
        log = self._logs / f"{worker}.log"
        self._pipes[worker], worker_end = Pipe()
        with worker_end, log.open("wb") as output:
            popen = self._running[worker] = subprocess.Popen(
                [*WORKER, str(worker_end.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | variables,
                pass_fds=[worker_end.fileno()],
                start_new_session=True,  # so that Ctrl-C reaches only the driver
            )
        self.send(worker, (self._kind, self._setup))
        threading.Thread(target=self._watch, args=(worker, popen, self._pipes[worker], log), daemon=True).start()

    def send(self, worker: str, command: tuple[type[Worker], WorkerSetup] | Task | StopTask | None) -> None:
        with suppress(ConnectionError):  # `messages` reports that the worker has ended.
            self._pipes[worker].send(command)

    def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]:
        messages: list[tuple[str, WorkerMessage | WorkerLost]] = []
        with suppress(queue.Empty):
            messages.append(self._messages.get(timeout=seconds))
            while True:
                messages.append(self._messages.get_nowait())
        return messages

    def end(self, worker: str) -> None:
        if (popen := self._running.pop(worker, None)) is not None:
            del self._device_numbers[worker], self._pipes[worker]
            popen.kill()
            popen.wait()

    def close(self) -> None:
        for worker in self._running:
            self.send(worker, None)  # The worker then exits by itself.
        until = time.monotonic() + EXIT_SECONDS
        for worker, popen in list(self._running.items()):
            with suppress(subprocess.TimeoutExpired):
                popen.wait(timeout=max(0.0, until - time.monotonic()))
            self.end(worker)

    def _watch(self, worker: str, popen: subprocess.Popen[bytes], pipe: Connection[Any, Any], log: Path) -> None:
        """Forward a worker's messages from its own thread, and report the worker as lost when they end."""
        with suppress(EOFError, ConnectionError):
            while True:
                self._messages.put((worker, pipe.recv()))
        with suppress(subprocess.TimeoutExpired):
            popen.wait(timeout=EXIT_SECONDS)
        self._messages.put((worker, _describe_loss(popen.poll(), log)))


def _describe_loss(status: int | None, log: Path) -> WorkerLost:
    if status is None or status < 0:
        signal = 9 if status is None else -status
        return WorkerLost(f"killed by signal {signal}", was_killed=signal == 9)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last_line = f": {lines[-1].strip()}" if lines else ""
    return WorkerLost(f"exit status {status}{last_line} (see {log})")
