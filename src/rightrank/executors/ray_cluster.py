"""Workers as actors of a Ray cluster (extra `rightrank[ray]`).

An actor holds one base and trains one task at a time. Its words come as a stream of JSON lines, so that Ray carries short
texts only: adapters and checkpoints go through the folder that all machines share.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rightrank.errors import InputError, MissingExtraError, RunError
from rightrank.executors.group import Rendezvous
from rightrank.executors.messages import WORKER_MESSAGE, Command, Stop, Task, WorkerMessage, WorkerSetup
from rightrank.executors.pool import WorkerLost
from rightrank.executors.worker import Service

CONNECT_SECONDS = 10.0
SPARE = 0.05  # of a GPU's memory, left to what its other workers' kernels take


class RayWorker:
    """The actor. `listen` is one long stream of what the worker tells."""

    def __init__(self) -> None:
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._service = self.service(lambda news: self._news.put(news.model_dump_json()))
        threading.Thread(target=self._service.work, daemon=True).start()

    def service(self, tell: Callable[[WorkerMessage], None]) -> Service:
        return Service(tell)

    def say(self, line: str) -> None:
        self._service.say(line)

    def listen(self) -> Iterator[str]:
        while True:
            lines = [self._news.get()]
            while not self._news.empty():
                lines.append(self._news.get())
            yield "\n".join(lines)


class RayCrew:
    """Actors placed by what the plan says a worker takes; those that have no room yet wait, which asks an autoscaler."""

    def __init__(
        self,
        setup: WorkerSetup,
        address: str | None,
        bytes_planned: int | None,
        on_cuda: bool,
        actor: type = RayWorker,
        size: int = 1,
    ) -> None:
        self._joined_before = _is_joined()
        self._ray = connected(address)
        self._setup = setup
        self._resources = resources(bytes_planned, on_cuda)
        self._require_a_place()
        self._actor = self._ray.remote(actor)
        self._size = size  # actors a worker, each with a device of its own
        self._rendezvous = Rendezvous(self._ray.util.get_node_ip_address(), size, on_cuda) if size > 1 else None
        self._actors: dict[str, list[Any]] = {}  # the first is listened to
        self._places: dict[str, Any] = {}  # of workers of several actors: their placement group
        self._streams: dict[Any, tuple[str, int]] = {}  # an actor's words → its worker, and which of it

    def room(self) -> int:
        """How many workers the nodes that are there hold, one at least."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return max(1, sum(_fit(node, self._resources) for node in nodes) // self._size)

    def start(self, worker: str) -> None:
        wanted = self._resources
        options = self._actor.options(
            num_cpus=wanted["CPU"],
            num_gpus=wanted.get("GPU", 0),
            memory=wanted.get("memory"),
            max_concurrency=4,  # it listens to commands while it tells
            max_restarts=0,  # the pool starts another
            runtime_env={"env_vars": _environment()},
            **self._place(worker),
        )
        actors = self._actors[worker] = [options.remote() for _ in range(self._size)]
        setup = [self._setup] if self._rendezvous is None else self._rendezvous.setups(self._setup, worker)
        for number, (actor, own) in enumerate(zip(actors, setup, strict=True)):
            self._streams[actor.listen.options(num_returns="streaming").remote()] = (worker, number)
            actor.say.remote(own.model_dump_json())

    def _place(self, worker: str) -> dict[str, Any]:
        """Of a worker of several actors: a placement group, so that all of them have room or none takes any."""
        if self._size == 1:
            return {}
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = self._ray.util.placement_group([self._resources] * self._size, strategy="PACK")
        self._places[worker] = group
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group)}

    def assign(self, worker: str, task: Task) -> None:
        self._say(worker, task)

    def request_stop(self, worker: str) -> None:
        self._say(worker, Stop())

    def end(self, worker: str) -> None:
        self._streams = {stream: whose for stream, whose in self._streams.items() if whose[0] != worker}
        for actor in self._actors.pop(worker, []):
            self._ray.kill(actor, no_restart=True)
        if (group := self._places.pop(worker, None)) is not None:
            self._ray.util.remove_placement_group(group)

    def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]:
        if not self._streams:
            threading.Event().wait(seconds)
            return []
        ready, _ = self._ray.wait(list(self._streams), num_returns=1, timeout=seconds)
        if ready:  # all that is there, not the first alone
            ready, _ = self._ray.wait(list(self._streams), num_returns=len(self._streams), timeout=0)
        found: list[tuple[str, WorkerMessage | WorkerLost]] = []
        for stream in ready:
            if stream not in self._streams:
                continue  # of a worker that was just found lost
            worker, number = self._streams[stream]
            try:
                lines = self._ray.get(next(stream))
            except (self._ray.exceptions.RayError, StopIteration) as error:
                self.end(worker)  # what is left of it
                found.append((worker, WorkerLost(_reason(error))))
            else:
                found.extend((worker, WORKER_MESSAGE.validate_json(line)) for line in lines.split("\n") if number == 0)
        return found

    def close(self) -> None:
        for worker in list(self._actors):
            self.end(worker)
        if not self._joined_before:
            self._ray.shutdown()

    def _say(self, worker: str, command: Command) -> None:
        for actor in self._actors[worker]:
            actor.say.remote(command.model_dump_json())

    def _require_a_place(self) -> None:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if any(_fit(node, self._resources) for node in nodes):
            return
        wanted = ", ".join(_words(name, amount) for name, amount in self._resources.items())
        raise InputError(
            f"no node of the Ray cluster has room for a worker ({wanted}); give smaller ranks, batch_size or seq_len, or larger nodes"
        )


def _is_joined() -> bool:
    """Whether the caller has a Ray session of its own, which is then left open."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def connected(address: str | None) -> Any:
    """The `ray` module, connected to a cluster.

    Raises:
        MissingExtraError: Ray is not installed.
        RunError: nothing answers at the address, or something that is no Ray of the same version.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtraError("executor 'ray' needs the package ray: pip install 'rightrank[ray]'") from None
    if ray.is_initialized():
        return ray
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own advice, where it warns otherwise
    if address is not None:
        _require_answer(address)
    try:
        if address is None:
            _join_or_begin(ray)
        else:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = "on this machine" if address is None else f"at {address}"
        raise RunError(f"the Ray cluster {where} can't be joined: {' '.join(str(error).split())}") from None
    return ray


def _join_or_begin(ray: Any) -> None:
    """The cluster that runs on this machine; where none does, one of this run's own that no other machine reaches."""
    try:
        ray.init(address="auto", logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError:
        ray.init(
            logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False, _node_ip_address="127.0.0.1"
        )


def _require_answer(address: str) -> None:
    """Ray itself waits long for a head that is not there."""
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


def resources(bytes_planned: int | None, on_cuda: bool) -> dict[str, float]:
    """What Ray is to keep for a worker: a core; a share of a GPU, or memory, by the plan."""
    if on_cuda:
        return {"CPU": 1.0, "GPU": gpu_share(bytes_planned)}
    return {"CPU": 1.0} if bytes_planned is None else {"CPU": 1.0, "memory": float(bytes_planned)}


def gpu_share(bytes_planned: int | None) -> float:
    """The part of a GPU like the driver's that a worker takes; a whole one where it is not known or over a half."""
    import torch

    if bytes_planned is None or not torch.cuda.is_available():
        return 1.0
    return share_of(bytes_planned, torch.cuda.get_device_properties(0).total_memory)


def share_of(needed: int, memory: int) -> float:
    """The whole fraction 1/n that holds `needed`, so that n workers fill a GPU; 1.0 where not even two fit."""
    return 1.0 / max(1, int(memory * (1 - SPARE) // needed))


def _fit(node: dict[str, float], wanted: dict[str, float]) -> int:
    return int(min(node.get(name, 0.0) / amount + 1e-9 for name, amount in wanted.items()))


def _environment() -> dict[str, str]:
    """What workers take over of this process's environment: where the package is, and how many threads."""
    names = ("PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")
    return {name: os.environ[name] for name in names if name in os.environ}


def _reason(error: BaseException) -> str:
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0]}" if words else type(error).__name__


def _words(name: str, amount: float) -> str:
    return f"{amount / 2**30:.2f} GiB of memory" if name == "memory" else f"{amount:g} {name}"
