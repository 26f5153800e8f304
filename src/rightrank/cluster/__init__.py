"""Train in workers: processes on this machine, or actors of a Ray cluster.

A worker holds one base model and trains one task at a time. A driver distributes the trials and receives each outcome exactly once, even if
workers are lost, hang or run out of memory. Adapters and checkpoints are stored in the run folder, which all machines share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rightrank.schema.errors import SettingsError

if TYPE_CHECKING:
    from rightrank.cluster.pool import WorkerBackend, WorkerPool
    from rightrank.cluster.worker import WorkerSetup
    from rightrank.runs.folder import RunFolder
    from rightrank.runs.prepare import LoadedSelection
    from rightrank.schema.events import Listener
    from rightrank.schema.settings import SelectSettings
    from rightrank.training.runtime import Runtime

MAX_TASK_TRIALS = 16  # The worker measures how many of them to train in one pass.


@contextmanager
def open_pool(prepared: LoadedSelection, folder: RunFolder, listener: Listener) -> Iterator[WorkerPool]:
    """Open an executor whose workers are processes or Ray actors. Workers start on demand and end with the context."""
    from rightrank.cluster.pool import WorkerPool
    from rightrank.cluster.worker import WorkerSetup, collect_versions

    request, on_cuda = prepared.request, prepared.runtime.loaded.device.type == "cuda"
    plan = prepared.planned
    needed_bytes = None if plan is None else max(plan.needed_bytes[rank] for rank in plan.ranks)
    with _offload_base(prepared.runtime):
        setup = WorkerSetup(
            request=replace(request, settings=prepared.settings),
            fingerprint=prepared.started.fingerprint,
            folder=folder.path.absolute(),
            working_folder=Path.cwd(),
        )
        backend, workers = _build_backend(request.settings, setup, needed_bytes, on_cuda)
        task_trials = request.settings.adapters_per_pass or (MAX_TASK_TRIALS if on_cuda else 1)
        pool = WorkerPool(backend, workers, collect_versions(), listener, task_trials=task_trials)
        try:
            yield pool
        finally:
            pool.close()


@contextmanager
def _offload_base(runtime: Runtime) -> Iterator[None]:
    """Move the driver's base to the CPU while workers use the accelerator."""
    import torch

    device = runtime.loaded.device
    if device.type == "cpu" or runtime.settings.weight_bits is not None:  # Quantised weights cannot be moved.
        yield
        return
    runtime.model.to("cpu")
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        runtime.model.to(device)


def _build_backend(
    settings: SelectSettings, setup: WorkerSetup, needed_bytes: int | None, on_cuda: bool
) -> tuple[WorkerBackend, int]:
    """Return the backend and the maximum number of workers.

    Args:
        needed_bytes: the planned memory of a worker; None if there is no plan.
    """
    import torch

    if settings.executor == "ray":
        from rightrank.cluster.on_ray import RayBackend

        backend = RayBackend(setup, needed_bytes, on_cuda)
        return backend, settings.workers or backend.count_available_workers()
    from rightrank.cluster.processes import ProcessBackend

    devices = torch.cuda.device_count() if on_cuda else 0
    workers = settings.workers or devices
    if not workers:
        raise SettingsError(
            "executor 'processes' needs a number of workers on a CPU; give one, for example --workers 2"
        )
    return ProcessBackend(setup, setup.folder / "workers", devices), workers
