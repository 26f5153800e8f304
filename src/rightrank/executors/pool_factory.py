"""A pool for the jobs of a run: the crew that the settings ask for, and the proof that it sees the run folder."""

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
from rightrank.executors.messages import Job, WorkerSetup
from rightrank.executors.pool import Crew, Pool, PoolOptions
from rightrank.executors.processes import ProcessCrew
from rightrank.executors.worker import versions
from rightrank.io.files import write_text
from rightrank.io.store import Store
from rightrank.records.observer import Observer
from rightrank.settings import SelectSettings

MAX_TASK_TRIALS = 16  # trials that a worker is given at once; it finds out how many of them share a pass


@dataclass(frozen=True, slots=True)
class WorkerNeeds:
    """What a worker takes, by the plan; None where the architecture can't be planned."""

    bytes_planned: int | None
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
    """Workers for `jobs`, whose run folders are in `folder` or are it; they start as there is work.

    `observer` receives what concerns all jobs, and the events of those that `job_observers` does not name.

    Raises:
        SettingsError: settings that don't go together.
        MissingExtraError: the executor's package is not installed.
        RunError: a cluster that does not answer.
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
    """The name of a file with the token, where all workers should see it: in the store, or in the run folder."""
    for left_over in folder.glob(".share-*"):  # of a driver that was killed; the run folder is ours alone
        left_over.unlink(missing_ok=True)
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
    """The crew and how many workers it has at most."""
    logs, size = folder / "workers", settings.devices_per_arm
    if settings.executor == "ray":
        from rightrank.executors.ray_cluster import RayCrew

        crew = RayCrew(setup, settings.ray_address, needs.bytes_planned, needs.on_cuda, size=size)
        return crew, settings.workers or crew.room()
    devices = torch.cuda.device_count() if needs.on_cuda and not settings.launcher else 0
    if devices and devices < size:
        raise SettingsError(f"devices_per_arm {size} needs as many CUDA devices: there are {devices}")
    workers = settings.workers or devices // size
    if not workers:
        raise SettingsError("executor 'processes' needs workers on a CPU: give their number, such as --workers 2")
    return ProcessCrew(setup, logs, devices, shlex.split(settings.launcher), size=size), workers


def _task_trials(settings: SelectSettings, needs: WorkerNeeds) -> int:
    return settings.pack_size or (MAX_TASK_TRIALS if needs.on_cuda else 1)


@contextmanager
def offloaded_base(bench: Runtime) -> Iterator[None]:
    """Keep the driver's own base off the accelerator while workers use it."""
    device = bench.loaded.device
    if device.type == "cpu" or bench.settings.weight_bits is not None:  # quantised matrices stay where they were made
        yield
        return
    bench.model.to("cpu")
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        bench.model.to(device)
