"""Workers as actors of a Ray cluster (extra `rightrank[ray]`).

An actor holds one base and trains one task at a time. Its messages are a stream of JSON lines, so Ray carries short
texts only; adapters and checkpoints go through the shared folder.
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

from rightrank.plugins.cluster.worker import WORKER_MESSAGE, Setup, Stop, Task, Worker, WorkerLost, WorkerMessage
from rightrank.schema.errors import InputError, MissingExtraError, RunError, described

# Variables of the environment that workers inherit from this process.
INHERITED = ("PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")
CONNECT_SECONDS = 10.0
HEAD_SECONDS = 10.0  # between looks at the cluster's head
SILENT_SECONDS = 30.0  # without an answer: the head is lost
REJOIN_SECONDS = 180.0  # for a head that was lost to come back


class RayWorker(Worker):
    """The actor. `messages` is one stream that lasts as long as the actor."""

    def __init__(self) -> None:
        self._sent: queue.SimpleQueue[str] = queue.SimpleQueue()
        super().__init__(lambda message: self._sent.put(message.model_dump_json()))
        threading.Thread(target=self.run, daemon=True).start()

    def close(self) -> None:
        super().close()
        self._sent.put("")  # the stream ends with the worker

    def messages(self) -> Iterator[str]:
        while line := self._sent.get():
            yield line


class RayCrew:
    """Actors with the resources that the plan says a worker needs. Actors without room wait, which triggers autoscaling."""

    def __init__(
        self, setup: Setup, address: str | None, bytes_planned: int | None, on_cuda: bool, actor: type = RayWorker
    ) -> None:
        ray = sys.modules.get("ray")
        self._joined_before = ray is not None and bool(ray.is_initialized())  # the caller's session is left open
        self._ray, self._address = connected(address), address
        self._setup = setup
        # One core, and a GPU or, on a CPU, the memory of the plan.
        self._resources = {"CPU": 1.0}
        if on_cuda:
            self._resources["GPU"] = 1.0
        elif bytes_planned is not None:
            self._resources["memory"] = float(bytes_planned)
        self._actor = actor
        self._next_look = 0.0  # at the cluster's head, on the monotonic clock
        self._answered = time.monotonic()  # when the head last did
        self.room()
        self._actors: dict[str, Any] = {}
        self._streams: dict[Any, str] = {}  # an actor's messages → its worker

    def room(self) -> int:
        """How many workers the present nodes have room for.

        Raises:
            InputError: no node has room for one.
        """
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        actors = sum(
            int(min(node.get(name, 0.0) / amount + 1e-9 for name, amount in self._resources.items())) for node in nodes
        )
        if not actors:
            wanted = ", ".join(
                f"{amount / 2**30:.2f} GiB of memory" if name == "memory" else f"{amount:g} {name}"
                for name, amount in self._resources.items()
            )
            raise InputError(
                f"no node of the Ray cluster has room for a worker ({wanted}); give smaller ranks, batch_size or seq_len, or larger nodes"
            )
        return actors

    def start(self, worker: str) -> None:
        wanted = self._resources
        options = self._ray.remote(self._actor).options(
            num_cpus=wanted["CPU"],
            num_gpus=wanted.get("GPU", 0),
            memory=wanted.get("memory"),
            max_concurrency=4,  # it receives commands while it sends messages
            max_restarts=0,  # the pool starts a new one
            runtime_env={"env_vars": {name: os.environ[name] for name in INHERITED if name in os.environ}},
        )
        actor = self._actors[worker] = options.remote()
        self._streams[actor.messages.options(num_returns="streaming").remote()] = worker
        actor.receive.remote(self._setup.model_dump_json())

    def send(self, worker: str, command: Task | Stop) -> None:
        if worker in self._actors:  # otherwise its end is reported already
            self._actors[worker].receive.remote(command.model_dump_json())

    def end(self, worker: str) -> None:
        self._streams = {stream: whose for stream, whose in self._streams.items() if whose != worker}
        if (actor := self._actors.pop(worker, None)) is not None:
            self._ray.kill(actor, no_restart=True)

    def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]:
        if not self._has_head():
            return self._join_again()
        if not self._streams:
            time.sleep(seconds)
            return []
        ready, _ = self._ray.wait(list(self._streams), num_returns=1, timeout=seconds)
        if ready:  # take all that has arrived, not only the first
            ready, _ = self._ray.wait(list(self._streams), num_returns=len(self._streams), timeout=0)
        arrived: list[tuple[str, WorkerMessage | WorkerLost]] = []
        for stream in ready:
            worker = self._streams[stream]
            try:
                line = self._ray.get(next(stream))
            except (self._ray.exceptions.RayError, StopIteration) as error:
                self.end(worker)
                arrived.append((worker, _lost(error)))
            else:
                arrived.append((worker, WORKER_MESSAGE.validate_json(line)))
        return arrived

    def _has_head(self) -> bool:
        """Whether the head is the one that was joined.

        Where another took its place, Ray would wait for new actors for ever; where none answers for a minute, it would abort.
        """
        from ray.experimental.internal_kv import _internal_kv_exists

        now = time.monotonic()
        if now < self._next_look:
            return True
        self._next_look = now + HEAD_SECONDS
        try:
            if self._address is not None:
                _require_answer(self._address)
            self._answered = now
            _internal_kv_exists(b"rightrank")
        except self._ray.exceptions.RayError:
            return False
        except RunError:
            return now < self._answered + SILENT_SECONDS
        return True

    def _join_again(self) -> list[tuple[str, WorkerMessage | WorkerLost]]:
        """Join the cluster of the new head. All workers are lost."""
        lost = "the head of the Ray cluster was lost"
        if self._joined_before:
            raise RunError(f"{lost}; join it again with ray.init(), and give the same call to resume")
        workers, self._actors, self._streams = list(self._actors), {}, {}
        until = time.monotonic() + REJOIN_SECONDS
        self._ray.shutdown()
        while True:
            try:
                self._ray = connected(self._address)
                break
            except RunError:
                if time.monotonic() > until:
                    raise
            time.sleep(1.0)
        self._answered = time.monotonic()
        return [(worker, WorkerLost(lost, with_machine=True)) for worker in workers]

    def close(self) -> None:
        for worker in list(self._actors):
            self.end(worker)
        if not self._joined_before:
            self._ray.shutdown()


def connected(address: str | None) -> Any:
    """The `ray` module, connected to a cluster.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: an address that is not HOST:PORT.
        RunError: no cluster answers at the address, or one of another Ray version.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtraError("executor 'ray' needs the package ray: pip install 'rightrank[ray]'") from None
    if ray.is_initialized():
        return ray
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as Ray recommends; otherwise it warns
    if address is not None:
        _require_answer(address)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        try:
            ray.init(address=address or "auto", **quiet)  # of this machine, where no address is given
        except ConnectionError:
            if address is not None:
                raise
            ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)  # no other machine can reach it
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = "on this machine" if address is None else f"at {address}"
        raise RunError(f"can't join the Ray cluster {where}: {' '.join(str(error).split())}") from None
    return ray


def _lost(error: Exception) -> WorkerLost:
    """Ray's sentence that says why an actor was lost, or its first line; with its node, or out of reach, or alone."""
    text = str(error)
    why = next((line.strip().split(". ")[0] for line in text.splitlines() if " because " in line), described(error))
    is_away = "its node has died" in text or type(error).__name__ == "ActorUnavailableError"
    return WorkerLost(why, with_machine=is_away)


def _require_answer(address: str) -> None:
    """Fail early: Ray itself waits long for a head that does not answer."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not colon or not port.isdigit():
        raise InputError(f"ray_address: got {address!r}; give HOST:PORT of the cluster's head, such as 10.0.0.5:6379")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise RunError(
            f"no Ray cluster answers at {address} within {CONNECT_SECONDS:g} s ({error.strerror or error}); "
            "start one with `ray start --head`, or give another ray_address"
        ) from None
