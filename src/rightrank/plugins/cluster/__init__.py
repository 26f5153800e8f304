"""Trainings in workers: processes on this machine, and actors of a Ray cluster.

A worker holds one base and trains one task at a time; a driver gives out trials and takes each outcome exactly once, whatever
workers are lost, hang or don't fit. Adapters and checkpoints go through the run folder, which all machines share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rightrank.runs.plugins import Plugin
from rightrank.schema.errors import SettingsError

if TYPE_CHECKING:
    from rightrank.plugins.cluster.pool import Crew, Pool
    from rightrank.plugins.cluster.worker import Setup
    from rightrank.runs.folder import RunFolder
    from rightrank.runs.local import Prepared
    from rightrank.schema.events import Listener
    from rightrank.schema.settings import SelectSettings
    from rightrank.train.runtime import Runtime

MAX_TASK_TRIALS = 16  # the worker measures how many of them to train in one pass


@contextmanager
def _workers(prepared: Prepared, folder: RunFolder, listener: Listener) -> Iterator[Pool]:
    """The executor of workers in processes or on Ray. They start on demand and run as long as the block."""
    from rightrank.plugins.cluster.pool import Pool
    from rightrank.plugins.cluster.worker import Setup, versions

    request, on_cuda = prepared.request, prepared.runtime.loaded.device.type == "cuda"
    plan = prepared.planned
    needed = None if plan is None else max(plan.needed_bytes[rank] for rank in plan.ranks)
    with _offloaded_base(prepared.runtime):
        setup = Setup(
            request=replace(request, settings=prepared.settings),
            fingerprint=prepared.started.fingerprint,
            folder=folder.path.absolute(),
            working_folder=Path.cwd(),
        )
        crew, workers = _crew(request.settings, setup, needed, on_cuda)
        task_trials = request.settings.adapters_per_pass or (MAX_TASK_TRIALS if on_cuda else 1)
        pool = Pool(crew, workers, versions(), listener, task_trials=task_trials)
        try:
            yield pool
        finally:
            pool.close()


@contextmanager
def _offloaded_base(runtime: Runtime) -> Iterator[None]:
    """Move the driver's base to the CPU while workers use the accelerator."""
    import torch

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


def _crew(settings: SelectSettings, setup: Setup, needed: int | None, on_cuda: bool) -> tuple[Crew, int]:
    """The crew and its maximum number of workers; `needed` is a worker's planned memory, None where there is no plan."""
    import torch

    if settings.executor == "ray":
        from rightrank.plugins.cluster.on_ray import RayCrew

        crew = RayCrew(setup, needed, on_cuda)
        return crew, settings.workers or crew.room()
    from rightrank.plugins.cluster.processes import ProcessCrew

    devices = torch.cuda.device_count() if on_cuda else 0
    workers = settings.workers or devices
    if not workers:
        raise SettingsError("executor 'processes' needs the number of workers on a CPU: give it, such as --workers 2")
    return ProcessCrew(setup, setup.folder / "workers", devices), workers


PLUGIN = Plugin(name="cluster", executors={"processes": _workers, "ray": _workers})
