"""Workers as processes on this machine, or wherever a launcher such as `srun` or `ssh` starts them.

A worker is `python -m rightrank.plugins.cluster.worker`, connected by pipes. Its stderr goes to a file in the run folder.
"""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from rightrank.plugins.cluster.messages import (
    WORKER_MESSAGE,
    Command,
    Group,
    Setup,
    Stop,
    Task,
    WorkerLost,
    WorkerMessage,
)
from rightrank.schema.errors import SettingsError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

LOOPBACK = "127.0.0.1"
WORKER = (sys.executable, "-m", "rightrank.plugins.cluster.worker")
ONE_MACHINE = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # network interface between the processes of a group
EXIT_SECONDS = 5.0  # for a worker to exit after its stdin is closed


@dataclass(frozen=True, slots=True)
class _Worker:
    """One process, or a group of which the first sends messages."""

    popens: list[subprocess.Popen[bytes]]
    place: int
    logs: list[Path]


class ProcessCrew:
    """`size` processes per worker; with CUDA devices, each process gets one of them."""

    def __init__(
        self,
        setup: Setup,
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
        self._running: dict[str, _Worker] = {}
        self._arrived: queue.SimpleQueue[tuple[str, WorkerMessage | WorkerLost]] = queue.SimpleQueue()

    def start(self, worker: str) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        taken = {one.place for one in self._running.values()}
        place = next(place for place in range(len(taken) + 1) if place not in taken)
        logs = [self._logs / f"{worker}{f'.{number}' if number else ''}.log" for number in range(self._size)]
        started = self._running[worker] = _Worker([], place, logs)
        for number, log in enumerate(logs):
            started.popens.append(self._launch(log, place * self._size + number, has_output=number == 0))
        setups = [self._setup] if self._rendezvous is None else self._rendezvous.setups(self._setup, worker)
        for popen, its_setup in zip(started.popens, setups, strict=True):
            _write(popen, its_setup)
            threading.Thread(target=self._watch, args=(worker, started, popen), daemon=True).start()

    def send(self, worker: str, command: Task | Stop) -> None:
        for popen in self._running[worker].popens:
            _write(popen, command)

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
        return self._running[worker].popens[0].pid

    def close(self) -> None:
        popens = [popen for worker in self._running.values() for popen in worker.popens]
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

    def _environment(self, device: int) -> dict[str, str]:
        environment = dict(os.environ)
        if self._size > 1 and sys.platform == "linux":  # a group on one machine listens on the loopback interface only
            environment = {**dict.fromkeys(ONE_MACHINE, "lo"), **environment}
        if self._devices:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = visible.split(",") if visible else [str(number) for number in range(self._devices)]
            environment["CUDA_VISIBLE_DEVICES"] = devices[device % len(devices)]
        return environment

    def _watch(self, name: str, worker: _Worker, popen: subprocess.Popen[bytes]) -> None:
        """Runs on a thread of its own: passes on what a process sends, then that its worker is lost."""
        with suppress(ValidationError):  # what it sends is not understood: lost too
            if popen.stdout is not None:
                with popen.stdout as lines:
                    for line in lines:
                        self._arrived.put((name, WORKER_MESSAGE.validate_json(line)))
        with suppress(subprocess.TimeoutExpired):
            popen.wait(timeout=EXIT_SECONDS if popen.stdout is not None else None)
        self._arrived.put((name, _why_lost(worker)))


def _why_lost(worker: _Worker) -> WorkerLost:
    """Why one of a worker's processes has ended; signals first, since the other processes end as a consequence."""
    ended = {number: popen.poll() for number, popen in enumerate(worker.popens)}
    statuses = {number: status for number, status in ended.items() if status is not None}
    number, status = min(statuses.items(), key=lambda item: item[1], default=(0, -9))
    if status < 0:
        return WorkerLost(f"killed by signal {-status}", killed=status == -9)
    log = worker.logs[number]
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last_line = f": {lines[-1].strip()}" if lines else ""
    return WorkerLost(f"exit status {status}{last_line} (see {log})")


def _kill(worker: _Worker) -> None:
    """Kill all processes of a worker and close their stdin."""
    for popen in worker.popens:
        popen.kill()
    for popen in worker.popens:
        popen.wait()
        assert popen.stdin is not None
        with suppress(OSError):
            popen.stdin.close()


def _write(popen: subprocess.Popen[bytes], command: Command) -> None:
    assert popen.stdin is not None
    with suppress(BrokenPipeError):  # its end is reported by `messages`
        popen.stdin.write(command.model_dump_json().encode() + b"\n")
        popen.stdin.flush()


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

    def setups(self, setup: Setup, worker: str) -> list[Setup]:
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
