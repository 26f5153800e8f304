"""The choice of an executor: this process, or workers that a plug-in has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rightrank.runs.executor import Executor, LocalExecutor
from rightrank.runs.hook import Run
from rightrank.runs.plugins import executors
from rightrank.runs.prepare import Prepared
from rightrank.runs.request import Request


@contextmanager
def executor_of(request: Request, prepared: Prepared, run: Run) -> Iterator[Executor]:
    """The executor that the settings name; workers run as long as the block.

    Raises:
        InputError: the settings don't fit the executor.
        RunError: no worker could start.
    """
    if request.settings.executor == "local":
        largest = prepared.planned.max_adapters_per_pass if prepared.planned else None
        yield LocalExecutor(prepared.runtime, run.folder, run, largest)
        return
    with executors()[request.settings.executor](request, prepared, run) as executor:
        yield executor
