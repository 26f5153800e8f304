"""One selection from start to hand-over."""

from __future__ import annotations

from rightrank.io.run_folder import RunFolder
from rightrank.preparation import Request
from rightrank.records import AdapterAnswer
from rightrank.records.observer import Observer
from rightrank.returns import Selected
from rightrank.selection.executor import executor_of
from rightrank.selection.finalize import finalize, finalize_adapter
from rightrank.selection.start import PreparedSelection, prepare_selection


def select(request: Request, folder: RunFolder, observer: Observer) -> Selected:
    """Load, plan, train, decide and hand over; an unfinished run in `folder` is resumed."""
    return run_selection(prepare_selection(request, folder, observer))


def run_selection(prepared: PreparedSelection) -> Selected:
    """Train what the strategy requests, decide, and hand over."""
    selection = prepared.selection

    def on_adapter(answer: AdapterAnswer) -> None:
        # While workers have the base, the test split can't be read: it is at the end.
        finalize_adapter(prepared, answer, reads_test_split=prepared.request.settings.executor == "local")

    with executor_of(prepared.request, prepared.prepared, selection) as executor:
        decision = selection.run(executor, on_adapter)
    return finalize(prepared, decision)
