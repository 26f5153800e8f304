"""One selection from start to hand-over."""

from __future__ import annotations

from rightrank.io.run_folder import RunFolder
from rightrank.preparation import Request
from rightrank.records.observer import Observer
from rightrank.returns import Selected
from rightrank.selection.executor import executor_of
from rightrank.selection.finalize import finalize
from rightrank.selection.start import PreparedSelection, prepare_selection


def select(request: Request, folder: RunFolder, observer: Observer) -> Selected:
    """Load, plan, train, decide and hand over; an unfinished run in `folder` is resumed."""
    return run_selection(prepare_selection(request, folder, observer))


def run_selection(prepared: PreparedSelection) -> Selected:
    """Train what the strategy requests, decide, and hand over."""
    with executor_of(prepared.request, prepared.prepared, prepared.selection) as executor:
        decision = prepared.selection.run(executor)
    return finalize(prepared, decision)
