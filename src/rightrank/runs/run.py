"""One selection from start to hand-over."""

from __future__ import annotations

from dataclasses import replace

from rightrank.runs.finish import finalize, finalize_adapter
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import Hooks
from rightrank.runs.places import executor_of
from rightrank.runs.prepare import Bases, Request
from rightrank.runs.returns import Selected
from rightrank.runs.start import PreparedSelection, prepare_selection
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.settings import SelectSettings

MAX_EXTENSIONS = 3


def select(request: Request, folder: RunFolder, hooks: Hooks) -> Selected:
    """Load, plan, train, decide and hand over; an unfinished run in `folder` is resumed.

    Where the settings ask for it, the run continues with the next rank or learning rate as long as the answer is rising or at
    the edge, and memory and budget allow.
    """
    bases: Bases = {}
    prepared = prepare_selection(request, folder, hooks, bases)
    selected = run_selection(prepared)
    for _ in range(MAX_EXTENSIONS if request.settings.extends else 0):
        settings = prepared.prepared.settings
        further = extended(settings, selected)
        if further is None:
            break
        before = selected.trainings
        prepared = prepare_selection(replace(request, settings=further), folder, hooks, bases)
        if set(prepared.prepared.settings.ranks) == set(settings.ranks) and further.ranks != settings.ranks:
            break  # the next rank does not fit the memory
        hooks.notice(f"extending: {selected.decision.sentence} {_what(settings, further)}")
        selected = run_selection(prepared)
        if selected.trainings == before:
            break  # the budget is spent
    hooks.on_end(selected)
    return selected


def extended(settings: SelectSettings, selected: Selected) -> SelectSettings | None:
    """The settings with the rank above, or the learning rate beyond the edge; None where the answer asks for neither."""
    decision = selected.decided
    if decision is None or not (decision.verdict == "rising" or "lr_edge" in decision.flags):
        return None
    wanted = next((run for run in decision.next_runs if run.action in ("rank", "rates")), None)
    if wanted is None:
        return None
    if wanted.action == "rank":
        further = settings.model_copy(update={"ranks": tuple(sorted({*settings.ranks, *wanted.ranks}))})
    else:
        rates = tuple(sorted({*settings.learning_rates, *wanted.learning_rates}))
        further = settings.model_copy(update={"learning_rates": rates})
    return None if further == settings else further


def _what(before: SelectSettings, after: SelectSettings) -> str:
    ranks = sorted(set(after.ranks) - set(before.ranks))
    rates = sorted(set(after.learning_rates) - set(before.learning_rates))
    return f"Adding rank {ranks[0]}." if ranks else f"Adding learning rate {rates[0]:.3g}."


def run_selection(prepared: PreparedSelection) -> Selected:
    """Train what the strategy requests, decide, and hand over."""
    selection = prepared.selection

    def on_adapter(answer: AdapterAnswer) -> None:
        # While workers have the base, the test split can't be read: it is at the end.
        finalize_adapter(prepared, answer, reads_test_split=prepared.request.settings.executor == "local")

    with executor_of(prepared.request, prepared.prepared, selection) as executor:
        decision = selection.run(executor, on_adapter)
    return finalize(prepared, decision)
