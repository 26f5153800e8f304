"""Train in other processes: on this machine (loky), or on a Ray cluster.

A worker holds one base model and trains one task at a time. The driver, the process of the selection, distributes the trials and
receives each outcome exactly once, even if workers are lost. Adapters, checkpoints and the workers' messages are files in the run
folder, which all machines share. Strategies, the journal and the decision stay in the driver.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rightrank.cluster.pool import WorkerPool
    from rightrank.runs.folder import RunFolder
    from rightrank.runs.prepare import LoadedSelection
    from rightrank.schema.events import Listener
    from rightrank.training.runtime import Runtime

MAX_TASK_TRIALS = 16  # The worker measures how many of them to train in one pass.


@contextmanager
def open_pool(prepared: LoadedSelection, folder: RunFolder, listener: Listener) -> Iterator[WorkerPool]:
    """Open an executor that trains in workers. They start on demand and end with the context."""
    from rightrank.cluster.backends import LocalBackend, RayBackend
    from rightrank.cluster.pool import WorkerPool
    from rightrank.cluster.worker import WorkerSetup, collect_versions

    settings, on_cuda = prepared.request.settings, prepared.runtime.loaded.device.type == "cuda"
    setup = WorkerSetup(
        request=replace(prepared.request, settings=prepared.settings),
        fingerprint=prepared.started.fingerprint,
        folder=folder.path.absolute(),
        working_folder=Path.cwd(),
        versions=collect_versions(),
    )
    shutil.rmtree(setup.messages, ignore_errors=True)  # of an earlier process
    setup.messages.mkdir()
    with _offload_base(prepared.runtime):
        if settings.ray is None:
            backend: LocalBackend | RayBackend = LocalBackend(setup, settings.workers or 1, on_cuda)
        else:
            plan = prepared.planned
            needed_bytes = None if plan is None else max(plan.needed_bytes[rank] for rank in plan.ranks)
            backend = RayBackend(setup, settings.ray, settings.workers, on_cuda, needed_bytes)
        task_trials = settings.adapters_per_pass or (MAX_TASK_TRIALS if on_cuda else 1)
        pool = WorkerPool(backend, setup.messages, listener, task_trials=task_trials)
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
