"""Workers as processes: on this machine, or wherever a launcher such as `srun` or `ssh` puts them.

A worker is `python -m rightrank.executors.worker` with pipes. Its stderr goes to a file in the run folder.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rightrank.errors import SettingsError
from rightrank.executors.group import LOOPBACK, Rendezvous
from rightrank.executors.messages import WORKER_MESSAGE, Command, Stop, Task, WorkerMessage, WorkerSetup
from rightrank.executors.pool import WorkerLost

WORKER = (sys.executable, "-m", "rightrank.executors.worker")
CHUNK = 1 << 16
ONE_MACHINE = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # the interface of a group's own talk
LEAVE_SECONDS = 5.0  # for workers whose commands have ended


@dataclass(slots=True)
class _Process:
    """A worker: one process, or a group whose first is listened to."""

    popens: list[subprocess.Popen[bytes]]
    place: int
    logs: list[Path]
    unread: bytes = b""
    told: list[WorkerMessage] = field(default_factory=list)

    @property
    def first(self) -> subprocess.Popen[bytes]:
        return self.popens[0]


class ProcessCrew:
    """One process a worker, or several (`size`); with CUDA devices, each process on one of them."""

    def __init__(
        self,
        setup: WorkerSetup,
        logs: Path,
        devices: int = 0,
        launcher: Sequence[str] = (),
        command: Sequence[str] = WORKER,
        size: int = 1,
    ) -> None:
        self._setup = setup
        self._logs = logs
        self._devices = devices  # CUDA devices to spread over; 0: none
        self._command = [*launcher, *command]
        self._size = size
        self._rendezvous = Rendezvous(LOOPBACK, size, on_cuda=devices > 0) if size > 1 else None
        self._running: dict[str, _Process] = {}
        self._selector = selectors.DefaultSelector()

    def start(self, worker: str) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        taken = {process.place for process in self._running.values()}
        place = next(place for place in range(len(taken) + 1) if place not in taken)
        logs = [self._logs / f"{worker}{f'.{number}' if number else ''}.log" for number in range(self._size)]
        process = _Process([], place, logs)
        self._running[worker] = process
        for number, log in enumerate(logs):
            process.popens.append(self._begun(log, place * self._size + number, is_heard=number == 0))
        pipe = process.first.stdout
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
        self._selector.register(pipe, selectors.EVENT_READ, worker)
        setup = [self._setup] if self._rendezvous is None else self._rendezvous.setups(self._setup, worker)
        for popen, own in zip(process.popens, setup, strict=True):
            _write(popen, own)

    def _begun(self, log: Path, device: int, is_heard: bool) -> subprocess.Popen[bytes]:
        try:
            with log.open("wb") as errors:
                return subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE if is_heard else subprocess.DEVNULL,
                    stderr=errors,
                    env=self._environment(device),
                    start_new_session=True,  # a Ctrl-C reaches the driver alone
                )
        except OSError as error:
            raise SettingsError(f"launcher: can't run {self._command[0]!r} ({error.strerror or error})") from None

    def assign(self, worker: str, task: Task) -> None:
        self._say(worker, task)

    def request_stop(self, worker: str) -> None:
        self._say(worker, Stop())

    def end(self, worker: str) -> None:
        process = self._running.pop(worker, None)
        if process is not None:
            self._end(process)

    def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]:
        found: list[tuple[str, WorkerMessage | WorkerLost]] = []
        for key, _ in self._selector.select(seconds):
            worker = key.data
            process = self._running[worker]
            ended = self._read(process)
            found.extend((worker, news) for news in process.told)
            process.told.clear()
            if ended:
                found.append((worker, self._lost(worker)))
        for worker, process in list(self._running.items()):
            if any(popen.poll() is not None for popen in process.popens[1:]):  # the others wait for it
                found.append((worker, self._lost(worker)))
        return found

    def process_id(self, worker: str) -> int:
        return self._running[worker].first.pid

    def close(self) -> None:
        popens = [popen for process in self._running.values() for popen in process.popens]
        for popen in popens:
            assert popen.stdin is not None
            with suppress(OSError):
                popen.stdin.close()  # it leaves by itself
        until = time.monotonic() + LEAVE_SECONDS
        for popen in popens:
            with suppress(subprocess.TimeoutExpired):
                popen.wait(timeout=max(0.0, until - time.monotonic()))
        for process in self._running.values():
            self._end(process)
        self._running.clear()
        self._selector.close()

    def _say(self, worker: str, command: Command) -> None:
        for popen in self._running[worker].popens:
            _write(popen, command)

    def _environment(self, device: int) -> dict[str, str]:
        environment = dict(os.environ)
        if self._size > 1:  # a group of one machine: what it listens on is for this machine alone
            environment = (
                {**dict.fromkeys(ONE_MACHINE, "lo"), **environment} if sys.platform == "linux" else environment
            )
        if self._devices:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = visible.split(",") if visible else [str(number) for number in range(self._devices)]
            environment["CUDA_VISIBLE_DEVICES"] = devices[device % len(devices)]
        return environment

    def _read(self, process: _Process) -> bool:
        """Take what was told; whether the pipe has ended."""
        pipe = process.first.stdout
        assert pipe is not None
        while chunk := pipe.read(CHUNK):
            *lines, process.unread = (process.unread + chunk).split(b"\n")
            process.told.extend(WORKER_MESSAGE.validate_json(line) for line in lines)
        return chunk is not None

    def _lost(self, worker: str) -> WorkerLost:
        """Of a worker one of whose processes has ended, or is about to: why."""
        process = self._running.pop(worker)
        if all(popen.poll() is None for popen in process.popens):  # its pipe has ended; it will
            with suppress(subprocess.TimeoutExpired):
                process.first.wait(timeout=LEAVE_SECONDS)
        ended = {number: popen.poll() for number, popen in enumerate(process.popens)}
        self._end(process)
        found = {number: status for number, status in ended.items() if status is not None} or {0: -9}
        number, status = min(found.items(), key=lambda one: one[1])  # a signal first: the others end of its consequence
        if status < 0:
            return WorkerLost(f"killed by signal {-status}", killed=status == -9)
        log = process.logs[number]
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = f": {lines[-1].strip()}" if lines else ""
        return WorkerLost(f"exit status {status}{said} (see {log})")

    def _end(self, process: _Process) -> None:
        """Whatever it does, all of it."""
        if process.first.stdout is not None:
            self._selector.unregister(process.first.stdout)
        for popen in process.popens:
            popen.kill()
        for popen in process.popens:
            popen.wait()
            for pipe in (popen.stdin, popen.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()


def _write(popen: subprocess.Popen[bytes], command: Command) -> None:
    assert popen.stdin is not None
    with suppress(BrokenPipeError):  # that it is gone comes as news
        popen.stdin.write(command.model_dump_json().encode() + b"\n")
        popen.stdin.flush()
