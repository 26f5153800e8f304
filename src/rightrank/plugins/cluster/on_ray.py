"""Workers as actors of a Ray cluster (extra `rightrank[ray]`).

An actor holds one base and trains one task at a time. Ray carries its messages; adapters and checkpoints go through the shared folder.
The cluster is that of `RAY_ADDRESS`, as everywhere in Ray; without it one that runs on this machine, else a new one.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from rightrank.plugins.cluster.worker import Setup, Stop, Task, Worker, WorkerLost, WorkerMessage
from rightrank.schema.errors import InputError, MissingExtraError, RunError, described

# Variables of the environment that workers inherit from this process.
INHERITED = ("PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")
ADDRESS = "RAY_ADDRESS"  # the variable with HOST:PORT of the cluster's head
CONNECT_SECONDS = 10.0
HEAD_SECONDS = 10.0  # between looks at the cluster's head
SILENT_SECONDS = 30.0  # without an answer: the head is lost
EXIT_SECONDS = 5.0  # for workers to remove their files
HEAD_LOST = "the head of the Ray cluster was lost"


class RayWorker(Worker):
    """The actor. `messages` is one stream that lasts as long as the actor."""

    def __init__(self, setup: Setup) -> None:
        self._sent: queue.SimpleQueue[WorkerMessage | None] = queue.SimpleQueue()
        super().__init__(setup, self._sent.put)
        threading.Thread(target=self.run, daemon=True).start()

    def close(self) -> None:
        super().close()
        self._sent.put(None)  # the stream ends with the worker

    def messages(self) -> Iterator[WorkerMessage]:
        while (message := self._sent.get()) is not None:
            yield message


class RayCrew:
    """Actors with the resources that the plan says a worker needs. Actors without room wait, which triggers autoscaling."""

    def __init__(self, setup: Setup, bytes_planned: int | None, on_cuda: bool, actor: type = RayWorker) -> None:
        ray = sys.modules.get("ray")
        self._joined_before = ray is not None and bool(ray.is_initialized())  # the caller's session is left open
        self._ray = connected()
        self._setup, self._actor = setup, actor
        # One core, and a GPU or, on a CPU, the memory of the plan.
        self._resources = {"CPU": 1.0}
        if on_cuda:
            self._resources["GPU"] = 1.0
        elif bytes_planned is not None:
            self._resources["memory"] = float(bytes_planned)
        self._next_look = 0.0  # at the cluster's head, on the monotonic clock
        self._answered = time.monotonic()  # when the head last did
        self._is_lost = False  # the head
        self._actors: dict[str, Any] = {}
        self._streams: dict[Any, str] = {}  # an actor's messages → its worker
        self.room()

    def room(self) -> int:
        """How many workers the present nodes have room for.

        Raises:
            InputError: no node has room for one.
        """
        wanted = self._resources
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        room = sum(int(min(node.get(name, 0.0) / amount + 1e-9 for name, amount in wanted.items())) for node in nodes)
        if not room:
            memory = f"{wanted['memory'] / 2**30:.2f} GiB of memory" if "memory" in wanted else "1 GPU"
            also = f", {memory}" if len(wanted) > 1 else ""
            raise InputError(
                f"no node of the Ray cluster has room for a worker (1 CPU{also}); give smaller ranks, batch_size or seq_len, "
                "or larger nodes"
            )
        return room

    def start(self, worker: str) -> None:
        """As `Crew`.

        Raises:
            RunError: the head of the cluster was lost.
        """
        if self._is_lost:
            raise RunError(f"{HEAD_LOST}; start the cluster again, and the same command resumes")
        actor = self._ray.remote(self._actor).options(
            num_cpus=self._resources["CPU"],
            num_gpus=self._resources.get("GPU", 0),
            memory=self._resources.get("memory"),
            max_concurrency=4,  # it receives commands while it sends messages
            max_restarts=0,  # the pool starts a new one
            runtime_env={"env_vars": {name: os.environ[name] for name in INHERITED if name in os.environ}},
        )
        self._actors[worker] = actor = actor.remote(self._setup)
        self._streams[actor.messages.options(num_returns="streaming").remote()] = worker

    def send(self, worker: str, command: Task | Stop) -> None:
        if worker in self._actors:  # otherwise its end is reported already
            self._actors[worker].receive.remote(command)

    def end(self, worker: str) -> None:
        self._streams = {stream: whose for stream, whose in self._streams.items() if whose != worker}
        if (actor := self._actors.pop(worker, None)) is not None:
            self._ray.kill(actor, no_restart=True)

    def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]:
        arrived: list[tuple[str, WorkerMessage | WorkerLost]] = []
        if self._is_head_lost():
            arrived += [(worker, WorkerLost(HEAD_LOST, with_machine=True)) for worker in self._actors]
            self._actors, self._streams = {}, {}
            return arrived
        if not self._streams:
            time.sleep(seconds)
            return []
        ready, _ = self._ray.wait(list(self._streams), num_returns=1, timeout=seconds)
        if ready:  # take all that has arrived, not only the first
            ready, _ = self._ray.wait(list(self._streams), num_returns=len(self._streams), timeout=0)
        for stream in ready:
            worker = self._streams[stream]
            try:
                arrived.append((worker, self._ray.get(next(stream))))
            except (self._ray.exceptions.RayError, StopIteration) as error:
                self.end(worker)
                arrived.append((worker, _lost(error)))
        return arrived

    def _is_head_lost(self) -> bool:
        """Whether another head took the place of the one that was joined, or none has answered for `SILENT_SECONDS`.

        Ray would wait for new actors for ever, or abort this process after a minute.
        """
        from ray.experimental.internal_kv import _internal_kv_exists

        now = time.monotonic()
        if not self._is_lost and now >= self._next_look:
            self._next_look = now + HEAD_SECONDS
            try:
                _require_answer()
                self._answered = now
                _internal_kv_exists(b"rightrank")
            except self._ray.exceptions.RayError:
                self._is_lost = True
            except RunError:
                self._is_lost = now >= self._answered + SILENT_SECONDS
        return self._is_lost

    def close(self) -> None:
        for actor in self._actors.values():
            actor.receive.remote(None)  # the worker then removes its files, and its stream ends
        until = time.monotonic() + EXIT_SECONDS
        while self._streams and time.monotonic() < until:
            self.messages(0.2)
        for worker in list(self._actors):
            self.end(worker)
        if not self._joined_before:
            self._ray.shutdown()


def connected() -> Any:
    """The `ray` module, connected to a cluster.

    Raises:
        MissingExtraError: Ray is not installed.
        RunError: no cluster answers at `RAY_ADDRESS`, or one of another Ray version.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtraError("executor 'ray' needs the package ray: pip install 'rightrank[ray]'") from None
    if ray.is_initialized():
        return ray
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as Ray recommends; otherwise it warns
    _require_answer()
    address = os.environ.get(ADDRESS)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError:
            if address:
                raise
            ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)  # no other machine can reach it
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"at {ADDRESS}={address}" if address else "on this machine"
        raise RunError(f"can't join the Ray cluster {where}: {' '.join(str(error).split())}") from None
    return ray


def _lost(error: Exception) -> WorkerLost:
    """Ray's sentence that says why an actor was lost, or its first line; with its node, or out of reach, or alone."""
    text = str(error)
    why = next((line.strip().split(". ")[0] for line in text.splitlines() if " because " in line), described(error))
    is_away = "its node has died" in text or type(error).__name__ == "ActorUnavailableError"
    return WorkerLost(why, with_machine=is_away)


def _require_answer() -> None:
    """Fail early: Ray itself waits long for a head that does not answer, and says at once what is no address."""
    address = os.environ.get(ADDRESS, "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise RunError(
            f"no Ray cluster answers at {address} within {CONNECT_SECONDS:g} s ({error.strerror or error}); "
            f"start one with `ray start --head`, or give another {ADDRESS}"
        ) from None
