"""The choice of an executor: this process, or workers in processes or on Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rightrank.plugins.cluster.factory import WorkerNeeds, offloaded_base, open_pool
from rightrank.plugins.cluster.pool import Job, PoolExecutor
from rightrank.runs.executor import Executor, LocalExecutor
from rightrank.runs.loop import Selection
from rightrank.runs.prepare import Prepared, Request
from rightrank.schema.errors import SettingsError

ONLY_JOB = "only"  # the name of the job of a run that has one


def require_placeable(request: Request) -> None:
    """Refuse a request that workers can't read, before anything is loaded.

    Raises:
        SettingsError: a model or data in memory, with an executor that has workers.
    """
    if request.settings.executor == "local":
        return
    for what, given in (("model", request.model), ("data", request.data)):
        if not isinstance(given, str) and not hasattr(given, "__fspath__"):
            raise SettingsError(
                f"executor {request.settings.executor!r}: the {what} is in memory, which workers can't read; "
                "give a path or a name, or executor 'local'"
            )


@contextmanager
def executor_of(request: Request, prepared: Prepared, selection: Selection) -> Iterator[Executor]:
    """The executor that the settings name; workers run as long as the block.

    Raises:
        InputError: the settings don't fit the executor.
        RunError: no worker could start.
    """
    if request.settings.executor == "local":
        largest = prepared.planned.max_adapters_per_pass if prepared.planned else None
        yield LocalExecutor(prepared.runtime, selection.folder, selection.listener, largest)
        return
    job = _job_of(request, prepared, selection)
    with (
        offloaded_base(prepared.runtime),
        open_pool(request.settings, [job], selection.folder.path, _needs_of(prepared), selection.listener) as pool,
    ):
        yield PoolExecutor(pool, ONLY_JOB)


def _job_of(request: Request, prepared: Prepared, selection: Selection) -> Job:
    """The selection as its workers receive it, with the ranks that the driver has settled."""
    return Job(
        name=ONLY_JOB,
        model=request.model_name,
        data=request.data_name,
        settings=prepared.settings.model_dump(mode="json"),
        folder=selection.folder.path.absolute(),
        fingerprint=prepared.started.fingerprint,
        begun=None if request.begun is None else dict(request.begun),
    )


def _needs_of(prepared: Prepared) -> WorkerNeeds:
    """What a worker needs to train any of the ranks."""
    plan = prepared.planned
    needed = None if plan is None else max(plan.needed_bytes[rank] for rank in plan.ranks)
    return WorkerNeeds(needed, prepared.runtime.loaded.device.type == "cuda")
