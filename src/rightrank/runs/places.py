"""The choice of an executor: this process, or workers in processes or on Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rightrank.runs.executor import Executor, LocalExecutor
from rightrank.runs.loop import Selection
from rightrank.runs.plugins import executors
from rightrank.runs.prepare import Prepared, Request
from rightrank.schema.errors import SettingsError


def require_placeable(request: Request) -> None:
    """Refuse a request that workers can't read, before anything is loaded.

    Raises:
        SettingsError: an executor that no plug-in has, or a model or data in memory with one that has workers.
    """
    if request.settings.executor == "local":
        return
    if request.settings.executor not in executors():
        raise SettingsError(f"executor {request.settings.executor!r} needs the plug-in cluster, which is not there")
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
    with executors()[request.settings.executor](request, prepared, selection) as executor:
        yield executor
