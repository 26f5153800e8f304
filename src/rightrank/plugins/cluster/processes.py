"""Workers as processes on this machine.

A worker is `python -m rightrank.plugins.cluster.worker`, connected by pipes. Its stderr goes to a file in the run folder.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from pydantic import ValidationError

from rightrank.plugins.cluster.worker import WORKER_MESSAGE, Command, Setup, Stop, Task, WorkerLost, WorkerMessage

WORKER = (sys.executable, "-m", "rightrank.plugins.cluster.worker")
EXIT_SECONDS = 5.0  # for a worker to exit after its stdin is closed


class ProcessCrew:
    """One process a worker; with CUDA devices, each gets one of them."""

    def __init__(self, setup: Setup, logs: Path, devices: int = 0, command: Sequence[str] = WORKER) -> None:
        self._setup = setup
        self._logs = logs
        self._devices = devices  # CUDA devices to use; 0: none
        self._command = command
        self._running: dict[str, subprocess.Popen[bytes]] = {}
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
        with log.open("wb") as errors:
            popen = self._running[worker] = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | visible,
                start_new_session=True,  # Ctrl-C reaches the driver alone
            )
        _write(popen, self._setup)
        threading.Thread(target=self._watch, args=(worker, popen, log), daemon=True).start()

    def send(self, worker: str, command: Task | Stop) -> None:
        _write(self._running[worker], command)

    def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]:
        arrived: list[tuple[str, WorkerMessage | WorkerLost]] = []
        with suppress(queue.Empty):
            arrived.append(self._arrived.get(timeout=seconds))
            while True:
                arrived.append(self._arrived.get_nowait())
        return arrived

    def end(self, worker: str) -> None:
        if (popen := self._running.pop(worker, None)) is not None:
            del self._places[worker]
            popen.kill()
            popen.wait()
            _close(popen)

    def close(self) -> None:
        for popen in self._running.values():
            _close(popen)  # the worker then exits by itself
        until = time.monotonic() + EXIT_SECONDS
        for worker, popen in list(self._running.items()):
            with suppress(subprocess.TimeoutExpired):
                popen.wait(timeout=max(0.0, until - time.monotonic()))
            self.end(worker)

    def _watch(self, worker: str, popen: subprocess.Popen[bytes], log: Path) -> None:
        """Runs on a thread of its own: passes on what a process sends, then that its worker is lost."""
        assert popen.stdout is not None
        with suppress(ValidationError), popen.stdout as lines:  # what it sends is not understood: lost too
            for line in lines:
                self._arrived.put((worker, WORKER_MESSAGE.validate_json(line)))
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


def _write(popen: subprocess.Popen[bytes], command: Command) -> None:
    assert popen.stdin is not None
    with suppress(BrokenPipeError):  # its end is reported by `messages`
        popen.stdin.write(command.model_dump_json().encode() + b"\n")
        popen.stdin.flush()


def _close(popen: subprocess.Popen[bytes]) -> None:
    assert popen.stdin is not None
    with suppress(OSError):
        popen.stdin.close()
