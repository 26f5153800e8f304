"""Workers as processes on this machine, connected by pipes. What a worker prints goes to a file in the run folder."""

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

from rightrank.plugins.cluster.worker import Setup, Stop, Task, Worker, WorkerLost, WorkerMessage

WORKER = (sys.executable, "-m", "rightrank.plugins.cluster.worker")
EXIT_SECONDS = 5.0  # for a worker to exit when it is asked to


class ProcessCrew:
    """One process a worker; with CUDA devices, each gets one of them."""

    def __init__(self, setup: Setup, logs: Path, devices: int = 0, kind: type[Worker] = Worker) -> None:
        self._setup, self._kind = setup, kind
        self._logs = logs
        self._devices = devices  # CUDA devices to use; 0: none
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._pipes: dict[str, Connection[Any, Any]] = {}
        self._places: dict[str, int] = {}  # worker → its device, where there are any
        self._arrived: queue.SimpleQueue[tuple[str, WorkerMessage | WorkerLost]] = queue.SimpleQueue()

    def start(self, worker: str) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        place = self._places[worker] = next(n for n in count() if n not in self._places.values())
        visible: dict[str, str] = {}
        if self._devices:  # a worker sees its device alone
            given = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = given.split(",") if given else [str(number) for number in range(self._devices)]
            visible = {"CUDA_VISIBLE_DEVICES": devices[place % len(devices)]}
        log = self._logs / f"{worker}.log"
        self._pipes[worker], theirs = Pipe()
        with theirs, log.open("wb") as output:
            popen = self._running[worker] = subprocess.Popen(
                [*WORKER, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | visible,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C reaches the driver alone
            )
        self.send(worker, (self._kind, self._setup))
        threading.Thread(target=self._watch, args=(worker, popen, self._pipes[worker], log), daemon=True).start()

    def send(self, worker: str, command: tuple[type[Worker], Setup] | Task | Stop | None) -> None:
        with suppress(ConnectionError):  # its end is reported by `messages`
            self._pipes[worker].send(command)

    def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]:
        arrived: list[tuple[str, WorkerMessage | WorkerLost]] = []
        with suppress(queue.Empty):
            arrived.append(self._arrived.get(timeout=seconds))
            while True:
                arrived.append(self._arrived.get_nowait())
        return arrived

    def end(self, worker: str) -> None:
        if (popen := self._running.pop(worker, None)) is not None:
            del self._places[worker], self._pipes[worker]
            popen.kill()
            popen.wait()

    def close(self) -> None:
        for worker in self._running:
            self.send(worker, None)  # the worker then exits by itself
        until = time.monotonic() + EXIT_SECONDS
        for worker, popen in list(self._running.items()):
            with suppress(subprocess.TimeoutExpired):
                popen.wait(timeout=max(0.0, until - time.monotonic()))
            self.end(worker)

    def _watch(self, worker: str, popen: subprocess.Popen[bytes], pipe: Connection[Any, Any], log: Path) -> None:
        """Runs on a thread of its own: passes on what a process sends, then that its worker is lost."""
        with suppress(EOFError, ConnectionError):
            while True:
                self._arrived.put((worker, pipe.recv()))
        with suppress(subprocess.TimeoutExpired):
            popen.wait(timeout=EXIT_SECONDS)
        self._arrived.put((worker, _why_lost(popen.poll(), log)))


def _why_lost(status: int | None, log: Path) -> WorkerLost:
    if status is None or status < 0:
        signal = 9 if status is None else -status
        return WorkerLost(f"killed by signal {signal}", killed=signal == 9)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last_line = f": {lines[-1].strip()}" if lines else ""
    return WorkerLost(f"exit status {status}{last_line} (see {log})")
