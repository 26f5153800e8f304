"""Workers as processes on this machine, or wherever a launcher such as `srun` or `ssh` starts them.

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
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from rightrank.plugins.cluster.messages import (
    WORKER_MESSAGE,
    Command,
    Setup,
    Stop,
    Task,
    WorkerLost,
    WorkerMessage,
)
from rightrank.schema.errors import SettingsError

WORKER = (sys.executable, "-m", "rightrank.plugins.cluster.worker")
EXIT_SECONDS = 5.0  # for a worker to exit after its stdin is closed


@dataclass(frozen=True, slots=True)
class _Worker:
    popen: subprocess.Popen[bytes]
    place: int
    log: Path


class ProcessCrew:
    """A process per worker; with CUDA devices, each gets one of them."""

    def __init__(
        self,
        setup: Setup,
        logs: Path,
        devices: int = 0,
        launcher: Sequence[str] = (),
        command: Sequence[str] = WORKER,
    ) -> None:
        self._setup = setup
        self._logs = logs
        self._devices = devices  # CUDA devices to use; 0: none
        self._command = [*launcher, *command]
        self._running: dict[str, _Worker] = {}
        self._arrived: queue.SimpleQueue[tuple[str, WorkerMessage | WorkerLost]] = queue.SimpleQueue()

    def start(self, worker: str) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        taken = {one.place for one in self._running.values()}
        place = next(place for place in range(len(taken) + 1) if place not in taken)
        log = self._logs / f"{worker}.log"
        started = self._running[worker] = _Worker(self._launch(log, place), place, log)
        _write(started.popen, self._setup)
        threading.Thread(target=self._watch, args=(worker, started), daemon=True).start()

    def send(self, worker: str, command: Task | Stop) -> None:
        _write(self._running[worker].popen, command)

    def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]:
        found: list[tuple[str, WorkerMessage | WorkerLost]] = []
        with suppress(queue.Empty):
            found.append(self._arrived.get(timeout=seconds))
            while True:
                found.append(self._arrived.get_nowait())
        return found

    def end(self, worker: str) -> None:
        if (ended := self._running.pop(worker, None)) is not None:
            _kill(ended)

    def process_id(self, worker: str) -> int:
        return self._running[worker].popen.pid

    def close(self) -> None:
        popens = [worker.popen for worker in self._running.values()]
        for popen in popens:
            assert popen.stdin is not None
            with suppress(OSError):
                popen.stdin.close()  # the worker then exits by itself
        until = time.monotonic() + EXIT_SECONDS
        for popen in popens:
            with suppress(subprocess.TimeoutExpired):
                popen.wait(timeout=max(0.0, until - time.monotonic()))
        for worker in list(self._running):
            self.end(worker)

    def _launch(self, log: Path, device: int) -> subprocess.Popen[bytes]:
        try:
            with log.open("wb") as errors:
                return subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=self._environment(device),
                    start_new_session=True,  # Ctrl-C reaches the driver alone
                )
        except OSError as error:
            raise SettingsError(
                f"launcher: can't run {self._command[0]!r} ({error.strerror or error}); give a program that is on the PATH"
            ) from None

    def _environment(self, device: int) -> dict[str, str]:
        environment = dict(os.environ)
        if self._devices:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = visible.split(",") if visible else [str(number) for number in range(self._devices)]
            environment["CUDA_VISIBLE_DEVICES"] = devices[device % len(devices)]
        return environment

    def _watch(self, name: str, worker: _Worker) -> None:
        """Runs on a thread of its own: passes on what a process sends, then that its worker is lost."""
        assert worker.popen.stdout is not None
        with suppress(ValidationError), worker.popen.stdout as lines:  # what is not understood: lost too
            for line in lines:
                self._arrived.put((name, WORKER_MESSAGE.validate_json(line)))
        with suppress(subprocess.TimeoutExpired):
            worker.popen.wait(timeout=EXIT_SECONDS)
        self._arrived.put((name, _why_lost(worker)))


def _why_lost(worker: _Worker) -> WorkerLost:
    """Why a worker's process has ended."""
    status = worker.popen.poll()
    if status is None or status < 0:
        signal = 9 if status is None else -status
        return WorkerLost(f"killed by signal {signal}", killed=signal == 9)
    lines = worker.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last_line = f": {lines[-1].strip()}" if lines else ""
    return WorkerLost(f"exit status {status}{last_line} (see {worker.log})")


def _kill(worker: _Worker) -> None:
    """Kill a worker's process and close its stdin."""
    worker.popen.kill()
    worker.popen.wait()
    assert worker.popen.stdin is not None
    with suppress(OSError):
        worker.popen.stdin.close()


def _write(popen: subprocess.Popen[bytes], command: Command) -> None:
    assert popen.stdin is not None
    with suppress(BrokenPipeError):  # its end is reported by `messages`
        popen.stdin.write(command.model_dump_json().encode() + b"\n")
        popen.stdin.flush()
