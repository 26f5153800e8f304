"""Workers as actors of a Ray cluster (extra `rightrank[ray]`).

An actor holds one base model and trains one task at a time. Ray carries the tasks; messages, adapters and checkpoints are files in the
shared run folder.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from concurrent.futures import Future
from typing import Any

from rightrank.cluster.worker import Task, Worker, WorkerSetup
from rightrank.schema.errors import InputError, RightrankError, RunError

# Environment variables that workers inherit from this process.
INHERITED_VARIABLES = ("PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")
CONNECT_SECONDS = 10.0
HEAD_SECONDS = 10.0  # between checks of the cluster's head
SILENT_SECONDS = 30.0  # after this time without an answer, the head counts as lost
EXIT_SECONDS = 5.0  # time for a worker to remove its files


class RayWorker:
    """A worker as an actor."""

    def __init__(self, backend: RayBackend, actor: Any) -> None:
        self._backend, self._actor = backend, actor

    def submit(self, task: Task) -> Future[RightrankError | None]:
        future: Future[RightrankError | None] = self._actor.run_task.remote(task).future()
        return future

    def end(self) -> None:
        if not self._backend.is_lost:
            self._backend.ray.kill(self._actor, no_restart=True)

    def close(self) -> None:
        if not self._backend.is_lost:
            self._backend.ray.wait([self._actor.close.remote()], timeout=EXIT_SECONDS)
        self.end()


class RayBackend:
    """The workers of a cluster. They request the planned resources and wait until these are free, which triggers autoscaling.

    Args:
        address: HOST:PORT of the cluster's head, or another address of `ray.init`.
        size: the maximum number of workers; None: as many as fit on the current nodes.
        planned_bytes: the planned memory of a worker; None without a plan.
    """

    def __init__(
        self, setup: WorkerSetup, address: str, size: int | None, on_cuda: bool, planned_bytes: int | None
    ) -> None:
        import ray

        self.ray: Any = ray
        self._setup, self._address, self.is_lost = setup, address, False
        self._was_connected = bool(ray.is_initialized())  # The caller's session is not closed.
        if not self._was_connected:
            _connect(ray, address)
        # A worker needs one core, and a GPU or, on a CPU, the planned memory.
        self._resources = {"CPU": 1.0} | ({"GPU": 1.0} if on_cuda else {"memory": float(planned_bytes or 0)})
        self._last_answer = self._next_check = time.monotonic()
        num_fitting = self._count_fitting_workers()
        self.size = size or num_fitting

    def _count_fitting_workers(self) -> int:
        """Return how many workers fit on the current nodes.

        Raises:
            InputError: no node has the resources for a worker.
        """
        needed = {name: amount for name, amount in self._resources.items() if amount}
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        count = sum(int(min(node.get(name, 0.0) / amount + 1e-9 for name, amount in needed.items())) for node in nodes)
        if not count:
            texts = {"CPU": "1 CPU", "GPU": "1 GPU", "memory": f"{needed.get('memory', 0) / 2**30:.2f} GiB of memory"}
            raise InputError(
                f"no node of the Ray cluster has room for a worker ({', '.join(texts[name] for name in needed)}); give smaller ranks, "
                "batch_size or seq_len, or larger nodes"
            )
        return count

    def start(self, name: str, slot: int) -> RayWorker:
        variables = {variable: os.environ[variable] for variable in INHERITED_VARIABLES if variable in os.environ}
        actor = self.ray.remote(Worker).options(
            num_cpus=self._resources["CPU"],
            num_gpus=self._resources.get("GPU", 0),
            memory=self._resources.get("memory") or None,
            max_restarts=0,  # The pool starts a new worker instead.
            runtime_env={"env_vars": variables},
        )
        return RayWorker(self, actor.remote(self._setup, name))

    def require_alive(self) -> None:
        """Raise RunError if the cluster's head was replaced by another one, or has not answered for `SILENT_SECONDS`.

        Without this check, Ray would wait for new actors forever, or abort this process after a minute.
        """
        from ray.experimental.internal_kv import _internal_kv_exists

        now = time.monotonic()
        if not self.is_lost and now >= self._next_check:
            self._next_check = now + HEAD_SECONDS
            try:
                _require_reachable_head(self._address)
                self._last_answer = now
                _internal_kv_exists(b"rightrank")
            except self.ray.exceptions.RayError:
                self.is_lost = True
            except RunError:
                self.is_lost = now >= self._last_answer + SILENT_SECONDS
        if self.is_lost:
            raise RunError(
                "the head of the Ray cluster was lost; restart the cluster and repeat the same command to resume"
            )

    def close(self) -> None:
        if not self._was_connected:
            self.ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Connect to a cluster.

    Raises:
        RunError: no cluster answers at the address, or it runs another Ray version.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray recommends this and warns otherwise.
    _require_reachable_head(address)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise RunError(f"cannot connect to the Ray cluster at {address}: {' '.join(str(error).split())}") from None


def _require_reachable_head(address: str) -> None:
    """Raise early if the head of the cluster does not answer, because Ray itself waits for a long time."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise RunError(
            f"no Ray cluster answers at {address} within {CONNECT_SECONDS:g} s ({error.strerror or error}); "
            "start one with `ray start --head`, or give another address"
        ) from None
