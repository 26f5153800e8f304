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
from rightrank.executors.messages import NEWS, Command, News, Orders, Stop, Task
from rightrank.executors.pool import Lost

WORKER = (sys.executable, "-m", "rightrank.executors.worker")
CHUNK = 1 << 16
LEAVE_SECONDS = 5.0  # for workers whose commands have ended


@dataclass(slots=True)
class _Process:
    popen: subprocess.Popen[bytes]
    place: int
    log: Path
    unread: bytes = b""
    told: list[News] = field(default_factory=list)


class ProcessCrew:
    """One process a worker; with CUDA devices, worker by worker on one of them."""

    def __init__(
        self,
        orders: Orders,
        logs: Path,
        devices: int = 0,
        launcher: Sequence[str] = (),
        command: Sequence[str] = WORKER,
    ) -> None:
        self._orders = orders
        self._logs = logs
        self._devices = devices  # CUDA devices to spread over; 0: none
        self._command = [*launcher, *command]
        self._running: dict[str, _Process] = {}
        self._selector = selectors.DefaultSelector()

    def start(self, worker: str) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        taken = {process.place for process in self._running.values()}
        place = next(place for place in range(len(taken) + 1) if place not in taken)
        log = self._logs / f"{worker}.log"
        try:
            with log.open("wb") as errors:
                popen = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=self._environment(place),
                    start_new_session=True,  # a Ctrl-C reaches the driver alone
                )
        except OSError as error:
            raise SettingsError(f"launcher: can't run {self._command[0]!r} ({error.strerror or error})") from None
        self._running[worker] = _Process(popen, place, log)
        assert popen.stdout is not None
        os.set_blocking(popen.stdout.fileno(), False)
        self._selector.register(popen.stdout, selectors.EVENT_READ, worker)
        self._say(worker, self._orders)

    def give(self, worker: str, task: Task) -> None:
        self._say(worker, task)

    def ask_to_stop(self, worker: str) -> None:
        self._say(worker, Stop())

    def end(self, worker: str) -> None:
        process = self._running.pop(worker, None)
        if process is None:
            return
        assert process.popen.stdout is not None
        self._selector.unregister(process.popen.stdout)
        process.popen.kill()
        self._reap(process)

    def news(self, seconds: float) -> list[tuple[str, News | Lost]]:
        found: list[tuple[str, News | Lost]] = []
        for key, _ in self._selector.select(seconds):
            worker = key.data
            process = self._running[worker]
            ended = self._read(process)
            found.extend((worker, news) for news in process.told)
            process.told.clear()
            if ended:
                found.append((worker, self._lost(worker)))
        return found

    def process_id(self, worker: str) -> int:
        return self._running[worker].popen.pid

    def close(self) -> None:
        for process in self._running.values():
            assert process.popen.stdin is not None
            with suppress(OSError):
                process.popen.stdin.close()  # it leaves by itself
        until = time.monotonic() + LEAVE_SECONDS
        for process in self._running.values():
            try:
                process.popen.wait(timeout=max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.popen.kill()
            self._reap(process)
        self._running.clear()
        self._selector.close()

    def _say(self, worker: str, command: Command) -> None:
        pipe = self._running[worker].popen.stdin
        assert pipe is not None
        with suppress(BrokenPipeError):  # that it is gone comes as news
            pipe.write(command.model_dump_json().encode() + b"\n")
            pipe.flush()

    def _environment(self, place: int) -> dict[str, str]:
        if not self._devices:
            return dict(os.environ)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(number) for number in range(self._devices)]
        return {**os.environ, "CUDA_VISIBLE_DEVICES": devices[place % len(devices)]}

    def _read(self, process: _Process) -> bool:
        """Take what was told; whether the pipe has ended."""
        pipe = process.popen.stdout
        assert pipe is not None
        while chunk := pipe.read(CHUNK):
            *lines, process.unread = (process.unread + chunk).split(b"\n")
            process.told.extend(NEWS.validate_json(line) for line in lines)
        return chunk is not None

    def _lost(self, worker: str) -> Lost:
        process = self._running.pop(worker)
        assert process.popen.stdout is not None
        self._selector.unregister(process.popen.stdout)
        status = self._reap(process)
        if status < 0:
            return Lost(f"killed by signal {-status}", killed=status == -9)
        lines = process.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = f": {lines[-1].strip()}" if lines else ""
        return Lost(f"exit status {status}{said} (see {process.log})")

    def _reap(self, process: _Process) -> int:
        status = process.popen.wait()
        for pipe in (process.popen.stdin, process.popen.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        return status
