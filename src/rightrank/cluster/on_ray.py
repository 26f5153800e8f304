"""Run workers as actors of a Ray cluster (extra `rightrank[ray]`).

An actor holds one base model and trains one task at a time. Ray carries its messages; adapters and checkpoints are stored in the shared run folder.
The cluster is the one at `RAY_ADDRESS`, as usual in Ray. Without that variable, a cluster that runs on this machine is joined, or a new one is started.
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

from rightrank.cluster.worker import StopTask, Task, Worker, WorkerLost, WorkerMessage, WorkerSetup
from rightrank.schema.errors import InputError, MissingExtraError, RunError, describe_error

# Environment variables that workers inherit from this process.
INHERITED_VARIABLES = ("PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")
ADDRESS_VARIABLE = "RAY_ADDRESS"  # the variable with HOST:PORT of the cluster's head
CONNECT_SECONDS = 10.0
HEAD_SECONDS = 10.0  # between checks of the cluster's head
SILENT_SECONDS = 30.0  # after this time without an answer, the head counts as lost
EXIT_SECONDS = 5.0  # time for workers to remove their files
HEAD_LOST = "the head of the Ray cluster was lost"


class RayWorker(Worker):
    """A worker as a Ray actor. `messages` is one stream that lasts as long as the actor."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._sent: queue.SimpleQueue[WorkerMessage | None] = queue.SimpleQueue()
        super().__init__(setup, self._sent.put)
        threading.Thread(target=self.run, daemon=True).start()

    def close(self) -> None:
        super().close()
        self._sent.put(None)  # ends the stream of messages

    def messages(self) -> Iterator[WorkerMessage]:
        while (message := self._sent.get()) is not None:
            yield message


class RayBackend:
    """A backend of actors that request the planned resources. Actors wait until resources are free, which triggers autoscaling."""

    def __init__(self, setup: WorkerSetup, bytes_planned: int | None, on_cuda: bool, actor: type = RayWorker) -> None:
        ray = sys.modules.get("ray")
        self._joined_before = ray is not None and bool(ray.is_initialized())  # The caller's session is not closed.
        self._ray = connect()
        self._setup, self._actor = setup, actor
        # A worker needs one core, and a GPU or, on a CPU, the planned memory.
        self._resources = {"CPU": 1.0}
        if on_cuda:
            self._resources["GPU"] = 1.0
        elif bytes_planned is not None:
            self._resources["memory"] = float(bytes_planned)
        self._next_head_check = 0.0  # on the monotonic clock
        self._last_head_answer = time.monotonic()  # on the monotonic clock
        self._is_lost = False  # whether the head was lost
        self._actors: dict[str, Any] = {}
        self._streams: dict[Any, str] = {}  # an actor's messages → its worker
        self.count_available_workers()

    def count_available_workers(self) -> int:
        """Return how many workers fit on the current nodes.

        Raises:
            InputError: no node has the resources for a worker.
        """
        resources = self._resources
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        num_workers = sum(
            int(min(node.get(name, 0.0) / amount + 1e-9 for name, amount in resources.items())) for node in nodes
        )
        if not num_workers:
            memory_text = f"{resources['memory'] / 2**30:.2f} GiB of memory" if "memory" in resources else "1 GPU"
            memory_suffix = f", {memory_text}" if len(resources) > 1 else ""
            raise InputError(
                f"no node of the Ray cluster has room for a worker (1 CPU{memory_suffix}); give smaller ranks, batch_size or seq_len, "
                "or larger nodes"
            )
        return num_workers

    def start(self, worker: str) -> None:
        """Start a worker; see `WorkerBackend`.

        Raises:
            RunError: the head of the cluster was lost.
        """
        if self._is_lost:
            raise RunError(f"{HEAD_LOST}; restart the cluster and repeat the same command to resume")
        actor = self._ray.remote(self._actor).options(
            num_cpus=self._resources["CPU"],
            num_gpus=self._resources.get("GPU", 0),
            memory=self._resources.get("memory"),
            max_concurrency=4,  # The actor receives commands while it streams messages.
            max_restarts=0,  # The pool starts a new worker instead.
            runtime_env={"env_vars": {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}},
        )
        self._actors[worker] = actor = actor.remote(self._setup)
        self._streams[actor.messages.options(num_returns="streaming").remote()] = worker

    def send(self, worker: str, command: Task | StopTask) -> None:
        if worker in self._actors:  # Otherwise its loss was already reported.
            self._actors[worker].receive.remote(command)

    def end(self, worker: str) -> None:
        self._streams = {stream: owner for stream, owner in self._streams.items() if owner != worker}
        if (actor := self._actors.pop(worker, None)) is not None:
            self._ray.kill(actor, no_restart=True)

    def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]:
        messages: list[tuple[str, WorkerMessage | WorkerLost]] = []
        if self._is_head_lost():
            messages += [(worker, WorkerLost(HEAD_LOST, is_machine_lost=True)) for worker in self._actors]
            self._actors, self._streams = {}, {}
            return messages
        if not self._streams:
            time.sleep(seconds)
            return []
        ready, _ = self._ray.wait(list(self._streams), num_returns=1, timeout=seconds)
        if ready:  # Read all messages that have arrived, not only the first.
            ready, _ = self._ray.wait(list(self._streams), num_returns=len(self._streams), timeout=0)
        for stream in ready:
            worker = self._streams[stream]
            try:
                messages.append((worker, self._ray.get(next(stream))))
            except (self._ray.exceptions.RayError, StopIteration) as error:
                self.end(worker)
                messages.append((worker, _describe_loss(error)))
        return messages

    def _is_head_lost(self) -> bool:
        """Return whether the cluster's head was replaced by another one, or has not answered for `SILENT_SECONDS`.

        Without this check, Ray would wait for new actors forever, or abort this process after a minute.
        """
        from ray.experimental.internal_kv import _internal_kv_exists

        now = time.monotonic()
        if not self._is_lost and now >= self._next_head_check:
            self._next_head_check = now + HEAD_SECONDS
            try:
                _require_reachable_head()
                self._last_head_answer = now
                _internal_kv_exists(b"rightrank")
            except self._ray.exceptions.RayError:
                self._is_lost = True
            except RunError:
                self._is_lost = now >= self._last_head_answer + SILENT_SECONDS
        return self._is_lost

    def close(self) -> None:
        for actor in self._actors.values():
            actor.receive.remote(None)  # The worker then removes its files and ends its stream.
        until = time.monotonic() + EXIT_SECONDS
        while self._streams and time.monotonic() < until:
            self.messages(0.2)
        for worker in list(self._actors):
            self.end(worker)
        if not self._joined_before:
            self._ray.shutdown()


def connect() -> Any:
    """Connect to a cluster and return the `ray` module.

    Raises:
        MissingExtraError: Ray is not installed.
        RunError: no cluster answers at `RAY_ADDRESS`, or it runs another Ray version.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtraError("executor 'ray' needs the package ray: pip install 'rightrank[ray]'") from None
    if ray.is_initialized():
        return ray
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray recommends this and warns otherwise.
    _require_reachable_head()
    address = os.environ.get(ADDRESS_VARIABLE)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError:
            if address:
                raise
            ray.init(
                include_dashboard=False, _node_ip_address="127.0.0.1", **quiet
            )  # not reachable from other machines
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        location = f"at {ADDRESS_VARIABLE}={address}" if address else "on this machine"
        raise RunError(f"cannot connect to the Ray cluster {location}: {' '.join(str(error).split())}") from None
    return ray


def _describe_loss(error: Exception) -> WorkerLost:
    """Build a `WorkerLost` from Ray's error, with the sentence that states why the actor was lost."""
    text = str(error)
    reason = next(
        (line.strip().split(". ")[0] for line in text.splitlines() if " because " in line), describe_error(error)
    )
    is_machine_lost = "its node has died" in text or type(error).__name__ == "ActorUnavailableError"
    return WorkerLost(reason, is_machine_lost=is_machine_lost)


def _require_reachable_head() -> None:
    """Raise early if the head of the cluster does not answer, because Ray itself waits for a long time."""
    address = os.environ.get(ADDRESS_VARIABLE, "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise RunError(
            f"no Ray cluster answers at {address} within {CONNECT_SECONDS:g} s ({error.strerror or error}); "
            f"start one with `ray start --head`, or give another {ADDRESS_VARIABLE}"
        ) from None
