"""Workers as processes on this machine, or wherever a launcher such as `srun` or `ssh` starts them.

A worker is `python -m rightrank.plugins.cluster.worker`, connected by pipes. Its stderr goes to a file in the run folder.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rightrank.plugins.cluster.pool import (
    WORKER_MESSAGE,
    Command,
    Group,
    Stop,
    Task,
    WorkerLost,
    WorkerMessage,
    WorkerSetup,
)
from rightrank.schema.errors import SettingsError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

LOOPBACK = "127.0.0.1"


class Rendezvous:
    """The store, at one address of this machine, where the processes of a crew's groups find each other."""

    def __init__(self, host: str, size: int, on_cuda: bool) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self._size = size
        self._backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        listener = socket.create_server((host, 0))  # a socket made by torch would listen on every address
        self._host, self._port = host, int(listener.getsockname()[1])
        self._store: TCPStore = TCPStore(
            host, self._port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def setups(self, setup: WorkerSetup, worker: str) -> list[WorkerSetup]:
        """One setup for each process of a worker; the first is for the process that sends messages."""
        groups = [
            Group(name=worker, number=number, size=self._size, host=self._host, port=self._port, backend=self._backend)
            for number in range(self._size)
        ]
        return [setup.model_copy(update={"group": group}) for group in groups]


def join(group: Group) -> None:
    """Wait for the other processes of the group and start `torch.distributed` with them."""
    import torch.distributed as dist
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    store = PrefixStore(group.name, TCPStore(group.host, group.port, is_master=False))
    dist.init_process_group(group.backend, store=store, rank=group.number, world_size=group.size)


WORKER = (sys.executable, "-m", "rightrank.plugins.cluster.worker")
CHUNK = 1 << 16
ONE_MACHINE = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # network interface between the processes of a group
EXIT_SECONDS = 5.0  # for a worker to exit after its stdin is closed


@dataclass(slots=True)
class _Process:
    """A worker: one process, or a group of which the first sends messages."""

    popens: list[subprocess.Popen[bytes]]
    place: int
    logs: list[Path]
    unread: bytes = b""
    received: list[WorkerMessage] = field(default_factory=list)

    @property
    def first(self) -> subprocess.Popen[bytes]:
        return self.popens[0]


class ProcessCrew:
    """`size` processes per worker; with CUDA devices, each process gets one of them."""

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
        self._devices = devices  # CUDA devices to use; 0: none
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
            process.popens.append(self._launch(log, place * self._size + number, has_output=number == 0))
        pipe = process.first.stdout
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
        self._selector.register(pipe, selectors.EVENT_READ, worker)
        setups = [self._setup] if self._rendezvous is None else self._rendezvous.setups(self._setup, worker)
        for popen, its_setup in zip(process.popens, setups, strict=True):
            _write(popen, its_setup)

    def _launch(self, log: Path, device: int, has_output: bool) -> subprocess.Popen[bytes]:
        try:
            with log.open("wb") as errors:
                return subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE if has_output else subprocess.DEVNULL,
                    stderr=errors,
                    env=self._environment(device),
                    start_new_session=True,  # Ctrl-C reaches the driver alone
                )
        except OSError as error:
            raise SettingsError(
                f"launcher: can't run {self._command[0]!r} ({error.strerror or error}); give a program that is on the PATH"
            ) from None

    def assign(self, worker: str, task: Task) -> None:
        self._send(worker, task)

    def request_stop(self, worker: str) -> None:
        self._send(worker, Stop())

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
            found.extend((worker, message) for message in process.received)
            process.received.clear()
            if ended:
                found.append((worker, self._lost(worker)))
        for worker, process in list(self._running.items()):
            if any(popen.poll() is not None for popen in process.popens[1:]):  # a group waits for a lost member
                found.append((worker, self._lost(worker)))
        return found

    def process_id(self, worker: str) -> int:
        return self._running[worker].first.pid

    def close(self) -> None:
        popens = [popen for process in self._running.values() for popen in process.popens]
        for popen in popens:
            assert popen.stdin is not None
            with suppress(OSError):
                popen.stdin.close()  # the worker then exits by itself
        until = time.monotonic() + EXIT_SECONDS
        for popen in popens:
            with suppress(subprocess.TimeoutExpired):
                popen.wait(timeout=max(0.0, until - time.monotonic()))
        for process in self._running.values():
            self._end(process)
        self._running.clear()
        self._selector.close()

    def _send(self, worker: str, command: Command) -> None:
        for popen in self._running[worker].popens:
            _write(popen, command)

    def _environment(self, device: int) -> dict[str, str]:
        environment = dict(os.environ)
        if self._size > 1:  # a group on one machine listens on the loopback interface only
            environment = (
                {**dict.fromkeys(ONE_MACHINE, "lo"), **environment} if sys.platform == "linux" else environment
            )
        if self._devices:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = visible.split(",") if visible else [str(number) for number in range(self._devices)]
            environment["CUDA_VISIBLE_DEVICES"] = devices[device % len(devices)]
        return environment

    def _read(self, process: _Process) -> bool:
        """Parse the complete lines that have arrived; return whether the pipe has ended."""
        pipe = process.first.stdout
        assert pipe is not None
        while chunk := pipe.read(CHUNK):
            *lines, process.unread = (process.unread + chunk).split(b"\n")
            process.received.extend(WORKER_MESSAGE.validate_json(line) for line in lines)
        return chunk is not None

    def _lost(self, worker: str) -> WorkerLost:
        """End what is left of a worker and state why one of its processes has ended."""
        process = self._running.pop(worker)
        if all(popen.poll() is None for popen in process.popens):  # the pipe has ended, so the process will too
            with suppress(subprocess.TimeoutExpired):
                process.first.wait(timeout=EXIT_SECONDS)
        ended = {number: popen.poll() for number, popen in enumerate(process.popens)}
        self._end(process)
        found = {number: status for number, status in ended.items() if status is not None} or {0: -9}
        # signals first: the other processes end as a consequence
        number, status = min(found.items(), key=lambda item: item[1])
        if status < 0:
            return WorkerLost(f"killed by signal {-status}", killed=status == -9)
        log = process.logs[number]
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last_line = f": {lines[-1].strip()}" if lines else ""
        return WorkerLost(f"exit status {status}{last_line} (see {log})")

    def _end(self, process: _Process) -> None:
        """Kill all processes of a worker and close its pipes."""
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
    with suppress(BrokenPipeError):  # its end is reported by `messages`
        popen.stdin.write(command.model_dump_json().encode() + b"\n")
        popen.stdin.flush()
