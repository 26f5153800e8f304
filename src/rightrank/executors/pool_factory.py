"""Makes the pool that the settings ask for, with a probe file that proves that its workers see the run folder."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from rightrank.engine.runtime import Runtime
from rightrank.errors import SettingsError
from rightrank.executors.crew import Crew
from rightrank.executors.messages import Job, WorkerSetup
from rightrank.executors.pool import Pool, PoolOptions
from rightrank.executors.processes import ProcessCrew
from rightrank.executors.worker import versions
from rightrank.io.files import write_text
from rightrank.io.store import Store
from rightrank.records.observer import Observer
from rightrank.settings import SelectSettings

MAX_TASK_TRIALS = 16  # the worker measures how many of them to train in one pass


@dataclass(frozen=True, slots=True)
class WorkerNeeds:
    bytes_planned: int | None  # peak memory; None: the architecture can't be planned
    on_cuda: bool


@contextmanager
def open_pool(
    settings: SelectSettings,
    jobs: Sequence[Job],
    folder: Path,
    needs: WorkerNeeds,
    observer: Observer,
    job_observers: Mapping[str, Observer] | None = None,
) -> Iterator[Pool]:
    """A pool of workers for `jobs`, whose run folders are `folder` itself or inside it. Workers start on demand.

    `observer` receives what concerns all jobs, and the events of those that `job_observers` does not name.

    Raises:
        SettingsError: no number of workers, or fewer CUDA devices than `devices_per_arm`.
        MissingExtraError: the executor's package is not installed.
        RunError: the cluster or the store does not answer.
    """
    token = secrets.token_hex(16)
    with _probe(settings.store, folder, token) as name:
        share = settings.store or str(folder.absolute())
        setup = WorkerSetup(jobs=list(jobs), working_folder=Path.cwd(), share=share, probe=name)
        crew, workers = _crew(settings, setup, folder, needs)
        options = PoolOptions(workers, versions(), token, _task_trials(settings, needs), settings.hang_seconds)
        pool = Pool(crew, options, observer, job_observers)
        try:
            yield pool
        finally:
            pool.close()


@contextmanager
def _probe(address: str, folder: Path, token: str) -> Iterator[str]:
    """Write the token to a file in the run folder, or in the store if there is one, and return the file's name."""
    for stale in folder.glob(".share-*"):  # from a driver that was killed; this process holds the folder's lock
        stale.unlink(missing_ok=True)
    probe = folder / f".share-{secrets.token_hex(4)}"
    store = Store(address) if address else None
    write_text(probe, token)
    try:
        if store is not None:
            store.put(probe, probe.name)
        yield probe.name
    finally:
        probe.unlink(missing_ok=True)
        if store is not None:
            store.remove(probe.name)


def _crew(settings: SelectSettings, setup: WorkerSetup, folder: Path, needs: WorkerNeeds) -> tuple[Crew, int]:
    """The crew and its maximum number of workers."""
    logs, size = folder / "workers", settings.devices_per_arm
    if settings.executor == "ray":
        from rightrank.executors.ray_cluster import RayCrew

        crew = RayCrew(setup, settings.ray_address, needs.bytes_planned, needs.on_cuda, size=size)
        return crew, settings.workers or crew.room()
    devices = torch.cuda.device_count() if needs.on_cuda and not settings.launcher else 0
    if devices and devices < size:
        raise SettingsError(
            f"devices_per_arm {size} needs {size} CUDA devices, this machine has {devices}; give {devices} or fewer"
        )
    workers = settings.workers or devices // size
    if not workers:
        raise SettingsError("executor 'processes' needs the number of workers on a CPU: give it, such as --workers 2")
    return ProcessCrew(setup, logs, devices, shlex.split(settings.launcher), size=size), workers


def _task_trials(settings: SelectSettings, needs: WorkerNeeds) -> int:
    return settings.adapters_per_pass or (MAX_TASK_TRIALS if needs.on_cuda else 1)


@contextmanager
def offloaded_base(runtime: Runtime) -> Iterator[None]:
    """Move the driver's base to the CPU while workers use the accelerator."""
    device = runtime.loaded.device
    if device.type == "cpu" or runtime.settings.weight_bits is not None:  # quantised matrices can't be moved
        yield
        return
    runtime.model.to("cpu")
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        runtime.model.to(device)
