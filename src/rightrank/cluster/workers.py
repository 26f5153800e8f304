"""Workers in other processes: of this machine (loky, extra `rightrank[workers]`), or actors of a Ray cluster (extra `rightrank[ray]`).

A worker loads its own base model, prepares the driver's request, and trains the tasks that it receives, one at a time. Messages, adapters
and checkpoints are files in the run folder, which all machines share. A worker stops at its next step with checkpoints when the driver has
ended or has created the file `stop`. With CUDA devices, each local worker sees one of them; what a worker prints is in a log file in the
run folder.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rightrank.cluster.pool import STOP_FILE, Backend, RemoteWorker, WorkerMessage, WorkerPool
from rightrank.data.files import report_disk_errors
from rightrank.schema.errors import InputError, InterruptedRun, RightrankError, RunError
from rightrank.schema.events import EvaluationProgress, Event, Listener, Notice, StepDone
from rightrank.schema.trials import Trial, TrialStarted
from rightrank.version import __version__

if TYPE_CHECKING:
    from loky import ProcessPoolExecutor

    from rightrank.runs.folder import RunFolder
    from rightrank.runs.prepare import LoadedSelection
    from rightrank.runs.selection import Executor, SelectionRequest


STEP_SECONDS = 0.5  # minimum time between two progress messages
SHARED_PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """The selection. A worker prepares the same request as the driver and must compute the same fingerprint."""

    request: SelectionRequest  # with the ranks that the driver chose
    fingerprint: str
    folder: Path  # the run folder, shared by driver and workers
    working_folder: Path  # for relative paths
    versions: dict[str, str]  # of the driver

    @property
    def messages(self) -> Path:
        """Return the folder of the workers' messages and logs."""
        return self.folder / "workers"


class Worker(Listener):
    """Run tasks, one at a time, independent of how they arrive."""

    def __init__(self, setup: WorkerSetup, name: str) -> None:
        self._setup, self._path = setup, setup.messages / f"{name}.jsonl"
        self._executor: Executor | None = None
        self._scratch = TemporaryDirectory(prefix="rightrank-worker-")
        self._parent, self._last_step = os.getppid(), 0.0
        with suppress(OSError):  # Without this folder, only absolute paths work.
            os.chdir(setup.working_folder)

    def run_task(self, trials: list[Trial], base_loss: float | None) -> RightrankError | None:
        """Send an outcome for each trial of a task, except those that were stopped. Return an error that every other worker would meet."""
        try:
            with report_disk_errors(self._setup.folder):
                self._executor = self._executor or self._open_executor()
                for outcome in self._executor.run(trials, base_loss):
                    self._send(outcome)
        except InterruptedRun:
            return None  # The trials have checkpoints.
        except RightrankError as error:
            return error
        return None

    def close(self) -> None:
        """Remove the worker's files from the local disk."""
        self._scratch.cleanup()

    def _open_executor(self) -> Executor:
        """Build the executor of this process, at its first task.

        Raises:
            InputError: this machine has other versions of the packages, or does not see the run folder.
            RunError: the request that is prepared here has another fingerprint than the driver's.
        """
        from rightrank.runs.folder import RunFolder
        from rightrank.runs.prepare import LocalExecutor, prepare_selection

        setup, node, versions = self._setup, platform.node(), collect_versions()
        for package, expected in setup.versions.items():
            if versions[package] != expected:
                raise InputError(
                    f"a worker on {node} has {package} {versions[package]}, but this process has {expected}; install the same version on "
                    "every machine"
                )
        if not setup.messages.is_dir():
            raise InputError(
                f"a worker on {node} cannot read the run folder {setup.folder}; give an --out on a disk that all machines share"
            )
        prepared = prepare_selection(setup.request, Path(self._scratch.name) / "cache")
        if prepared.started.fingerprint != setup.fingerprint:
            raise RunError(
                f"a worker on {node} reads a different model or different data at {setup.request.model_name} and "
                f"{setup.request.data_name}: give paths that point to the same files on every machine"
            )
        return LocalExecutor(prepared.runtime, RunFolder(setup.folder), self, prepared.planned)

    def on_event(self, event: Event) -> None:
        """Send the starts, the steps and the notices of the trials."""
        now = time.monotonic()
        if isinstance(event, TrialStarted | Notice):
            self._send(event)
        elif isinstance(event, StepDone | EvaluationProgress) and now - self._last_step >= STEP_SECONDS:
            self._last_step = now
            self._send(event)

    def should_stop(self) -> bool:
        return os.getppid() != self._parent or (self._setup.messages / STOP_FILE).exists()

    def _send(self, message: WorkerMessage) -> None:
        with self._path.open("ab") as file:
            file.write(message.model_dump_json().encode() + b"\n")


def collect_versions() -> dict[str, str]:
    """Return the versions that must be the same on every machine."""
    own_versions = {"rightrank": __version__, "python": platform.python_version()}
    return own_versions | {name: version(name) for name in SHARED_PACKAGES}


MAX_TASK_TRIALS = 16  # A worker trains several of them in one pass if they fit.
# Environment variables that workers inherit from this process.
INHERITED_VARIABLES = ("PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")
CONNECT_SECONDS = 10.0
HEAD_SECONDS = 10.0  # between checks of the cluster's head
SILENT_SECONDS = 30.0  # after this time without an answer, the head counts as lost
EXIT_SECONDS = 5.0  # time for a worker to remove its files
# An idle worker ends after this time and starts again on demand. So workers whose driver was killed end too.
IDLE_SECONDS = 60.0

_worker: Worker | None = None  # of this process, if it is a worker


@contextmanager
def open_pool(prepared: LoadedSelection, folder: RunFolder, listener: Listener) -> Iterator[WorkerPool]:
    """Open an executor that trains in workers. They start on demand and end with the context.

    The driver's base is on the CPU while workers use the accelerator.
    """
    from rightrank.evaluation.device import free_memory

    settings, runtime = prepared.request.settings, prepared.runtime
    device, is_movable = runtime.loaded.device, settings.weight_bits is None  # Quantised weights cannot be moved.
    on_cuda = device.type == "cuda"
    setup = WorkerSetup(
        request=replace(prepared.request, settings=prepared.settings),
        fingerprint=prepared.started.fingerprint,
        folder=folder.path.absolute(),
        working_folder=Path.cwd(),
        versions=collect_versions(),
    )
    shutil.rmtree(setup.messages, ignore_errors=True)  # of an earlier process
    setup.messages.mkdir()
    if is_movable:
        runtime.model.to("cpu")
        free_memory(device)
    try:
        if settings.ray is None:
            backend: Backend = LocalBackend(setup, settings.workers or 1, on_cuda)
        else:
            plan = prepared.planned
            needed_bytes = None if plan is None else max(plan.needed_bytes[rank] for rank in plan.ranks)
            backend = RayBackend(setup, settings.ray, settings.workers, on_cuda, needed_bytes)
        task_trials = settings.adapters_per_pass or (MAX_TASK_TRIALS if on_cuda else 1)
        with closing(WorkerPool(backend, setup.messages, listener, task_trials=task_trials)) as pool:
            yield pool
    finally:
        if is_movable:
            runtime.model.to(device)


class LocalWorker(RemoteWorker):
    def __init__(self, executor: ProcessPoolExecutor) -> None:
        self._executor = executor

    def submit(self, trials: list[Trial], base_loss: float | None) -> Future[RightrankError | None]:
        future: Future[RightrankError | None] = self._executor.submit(_run_task, trials, base_loss)
        return future

    def end(self, *, is_idle: bool) -> None:
        self._executor.shutdown(wait=True, kill_workers=not is_idle)


class LocalBackend(Backend):
    def __init__(self, setup: WorkerSetup, size: int, on_cuda: bool) -> None:
        import torch

        self._setup, self.size = setup, size
        visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        self._devices = visible_devices.split(",") if on_cuda else []

    def start(self, name: str, slot: int) -> LocalWorker:
        from loky import ProcessPoolExecutor

        environment = {"LOKY_MAX_MEMORY_LEAK_SIZE": "1e18"}  # The memory of a worker grows as it loads its base.
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices[slot % len(self._devices)]
        arguments = self._setup, name
        return LocalWorker(
            ProcessPoolExecutor(1, timeout=IDLE_SECONDS, initializer=_start_worker, initargs=arguments, env=environment)
        )


def _start_worker(setup: WorkerSetup, name: str) -> None:
    """Make this process a worker, whose output goes to its log."""
    global _worker
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # The driver handles them and then stops its workers.
    log = os.open(setup.messages / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    _worker = Worker(setup, name)


def _run_task(trials: list[Trial], base_loss: float | None) -> RightrankError | None:
    assert _worker is not None
    return _worker.run_task(trials, base_loss)


class RayWorker(RemoteWorker):
    def __init__(self, backend: RayBackend, actor: Any) -> None:
        self._backend, self._actor = backend, actor

    def submit(self, trials: list[Trial], base_loss: float | None) -> Future[RightrankError | None]:
        future: Future[RightrankError | None] = self._actor.run_task.remote(trials, base_loss).future()
        return future

    def end(self, *, is_idle: bool) -> None:
        ray = self._backend.ray
        if self._backend.is_lost:
            return
        if is_idle:
            ray.wait([self._actor.close.remote()], timeout=EXIT_SECONDS)
        ray.kill(self._actor, no_restart=True)


class RayBackend(Backend):
    """The workers of a cluster. They request the planned resources and wait until these are free, which triggers autoscaling.

    Args:
        address: HOST:PORT of the cluster's head, or another address of `ray.init`.
        size: the maximum number of workers; None: as many as fit on the current nodes.
        planned_bytes: the planned memory of a worker; None without a plan.

    Raises:
        RunError: the cluster can't be reached.
        InputError: no node has the resources for a worker.
    """

    def __init__(
        self, setup: WorkerSetup, address: str, size: int | None, on_cuda: bool, planned_bytes: int | None
    ) -> None:
        import ray

        self.ray: Any = ray
        self._setup, self._address, self.is_lost = setup, address, False
        self._was_connected = bool(ray.is_initialized())  # The caller's session is not closed.
        if not self._was_connected:
            self._connect()
        # A worker needs one core, and a GPU or, on a CPU, the planned memory.
        self._resources = {"CPU": 1.0} | ({"GPU": 1.0} if on_cuda else {"memory": float(planned_bytes or 0)})
        self._last_answer = self._next_check = time.monotonic()
        needed = {resource: amount for resource, amount in self._resources.items() if amount}
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        num_fitting = sum(
            int(min(node.get(resource, 0.0) / amount + 1e-9 for resource, amount in needed.items())) for node in nodes
        )
        if not num_fitting:
            texts = {"CPU": "1 CPU", "GPU": "1 GPU", "memory": f"{needed.get('memory', 0) / 2**30:.2f} GiB of memory"}
            raise InputError(
                f"no node of the Ray cluster has room for a worker ({', '.join(map(texts.__getitem__, needed))}); give smaller ranks, "
                "batch_size or seq_len, or larger nodes"
            )
        self.size = size or num_fitting

    def _connect(self) -> None:
        """Connect to the cluster.

        Raises:
            RunError: no cluster answers at the address, or it runs another Ray version.
        """
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray recommends this and warns otherwise.
        _require_reachable_head(self._address)
        try:
            self.ray.init(address=self._address, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"cannot connect to the Ray cluster at {self._address}: {reason}") from None

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
