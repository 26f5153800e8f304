"""From a request's settings to the executor that runs its trials."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rightrank.errors import SettingsError
from rightrank.executors import Executor
from rightrank.executors.local import LocalExecutor
from rightrank.executors.messages import Job
from rightrank.executors.pool import PoolExecutor
from rightrank.executors.pool_factory import WorkerNeeds, offloaded_base, open_pool
from rightrank.preparation import Prepared, Request
from rightrank.selection.loop import Selection

ONLY = "only"  # the name of a run's one job


def require_placeable(request: Request) -> None:
    """Refuse what workers can't be told of, before anything is loaded.

    Raises:
        SettingsError: a model or data in memory, where workers are asked for.
    """
    if request.settings.executor == "local":
        return
    for what, given in (("model", request.model), ("data", request.data)):
        if not isinstance(given, str) and not hasattr(given, "__fspath__"):
            raise SettingsError(
                f"executor {request.settings.executor!r}: the {what} is in memory, where workers can't read it; "
                "give a path or a name, or executor 'local'"
            )


@contextmanager
def executor_of(request: Request, prepared: Prepared, selection: Selection) -> Iterator[Executor]:
    """In this process, or workers that last as long as the block.

    Raises:
        InputError, RunError: no worker can be had, and why.
    """
    if request.settings.executor == "local":
        most = prepared.planned.largest_pack if prepared.planned else None
        yield LocalExecutor(prepared.bench, selection.folder, selection.observer, most)
        return
    job = job_of(ONLY, request, prepared, selection)
    with (
        offloaded_base(prepared.bench),
        open_pool(request.settings, [job], selection.folder.path, most_needs([prepared]), selection.observer) as pool,
    ):
        yield PoolExecutor(pool, ONLY)


def job_of(name: str, request: Request, prepared: Prepared, selection: Selection) -> Job:
    """A selection as its workers are told of it: the ranks are settled, so that they settle nothing anew."""
    return Job(
        name=name,
        model=request.model_name,
        data=request.data_name,
        settings=prepared.settings.model_dump(mode="json"),
        folder=selection.folder.path.absolute(),
        fingerprint=prepared.started.fingerprint,
        known_settings=request.known_settings,
    )


def most_needs(prepared: Sequence[Prepared]) -> WorkerNeeds:
    """What a worker takes that may train any of these: the most that any of their ranks takes."""
    plans = [one.planned for one in prepared]
    needed = [plan.needed_bytes[rank] for plan in plans if plan is not None for rank in plan.ranks]
    on_cuda = any(one.bench.loaded.device.type == "cuda" for one in prepared)
    return WorkerNeeds(max(needed) if all(plan is not None for plan in plans) else None, on_cuda)
