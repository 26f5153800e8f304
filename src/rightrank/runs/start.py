"""The start of a selection: data and base loaded, cost estimated, journal opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rightrank.hooks.guard import GuardData, load_guards
from rightrank.hooks.outlook import (
    MIN_STEPS,
    adapter_lines,
    answers_line,
    clock_of,
    cost_line,
    kind_lines,
    preflight_of,
    strategy_of,
    time_line,
)
from rightrank.hooks.trackers import Trackers, require_trackers
from rightrank.report.tables import labels_line, memory_lines, precision_lines, selection_lines
from rightrank.runs.folder import RunFolder, run_store
from rightrank.runs.hook import Hooks
from rightrank.runs.loop import LoopOptions, Selection
from rightrank.runs.places import require_placeable
from rightrank.runs.prepare import Bases, Prepared, Request, prepare, resuming
from rightrank.runs.rescoring import rescore
from rightrank.schema.events import RunResumed, RunStarted, SelectionPlanned, TimeExpected
from rightrank.schema.results import SelectionCost
from rightrank.search.protocol import Strategy
from rightrank.search.strategies import make_strategy
from rightrank.train.metrics import end_metrics


@dataclass(frozen=True, slots=True)
class PreparedSelection:
    request: Request
    prepared: Prepared
    selection: Selection
    estimate: SelectionCost | None  # None: this device has no measurement to estimate from
    trackers: Trackers
    hooks: Hooks
    guards: list[GuardData] = field(default_factory=list)


def prepare_selection(
    request: Request, folder: RunFolder, hooks: Hooks, bases: Bases | None = None
) -> PreparedSelection:
    """Load data and base, open the journal, and report what the selection will cost.

    `bases` holds the base models that other selections have loaded.
    """
    make_strategy(request.settings, request.settings.max_steps or 1)  # refuses a wrong name before anything is loaded
    require_placeable(request)
    require_trackers(request.settings.report_to)
    journal = folder.journal.read(hooks.notice)
    request = resuming(request, journal)
    waiting: list[str] = []  # a request that can't be used is refused in one line
    prepared = prepare(request, folder.cache, waiting.append, bases)
    guards = load_guards(prepared.settings, prepared.runtime.loaded, prepared.started.data.classes)
    for line in waiting:
        hooks.notice(line)
    if request.settings.store:
        folder.store = run_store(request.settings.store, prepared.started.fingerprint)
    hooks.on_prepared(prepared)
    strategy = strategy_of(prepared)
    goal = prepared.settings.goal
    options = LoopOptions(goal, peak_of=prepared.planned.peak_of) if prepared.planned else LoopOptions(goal)
    report_to = request.settings.report_to
    selection, trackers = open_selection(folder, prepared.started, prepared.steps, strategy, options, report_to, hooks)
    rescore(folder, selection.records, prepared.runtime, hooks.notice)
    cost = _announce(prepared, strategy, selection, hooks)
    return PreparedSelection(request, prepared, selection, cost, trackers, hooks, guards)


def _announce(prepared: Prepared, strategy: Strategy, selection: Selection, hooks: Hooks) -> SelectionCost | None:
    """Say what the selection will cost and find; its cost, or None where this device has no measurement."""
    clock = clock_of(prepared, measure=_is_worth_measuring(prepared, selection))
    cost = None if clock is None else clock.cost(strategy)
    measured = None if clock is None else clock.basis
    cost_lines = selection_lines(cost) if cost and not measured else [cost_line(strategy, prepared.steps)]
    if cost is not None and measured is not None:
        cost_lines.append(time_line(cost, measured, prepared.settings.budget_hours))
        hooks.on_event(TimeExpected(expected_seconds=cost.expected.seconds or 0.0))
    found = preflight_of(prepared, strategy, clock)
    first = [labels_line(found), *memory_lines(found), *cost_lines, *precision_lines(found)]
    for line in [*first, *kind_lines(prepared), *adapter_lines(prepared)]:
        hooks.notice(line)
    if end_metrics(prepared.settings):
        hooks.notice(answers_line(prepared.settings, prepared.started))
    return cost


def _is_worth_measuring(prepared: Prepared, selection: Selection) -> bool:
    """Whether trainings are long beside the measured steps, and none has ended, which would give its time."""
    return prepared.steps >= MIN_STEPS and not any(trial.rank > 0 for trial in selection.records.finished())


def open_selection(
    folder: RunFolder,
    started: RunStarted,
    steps: int,
    strategy: Strategy,
    options: LoopOptions,
    report_to: Sequence[str],
    hooks: Hooks,
) -> tuple[Selection, Trackers]:
    """Open the journal, and report the plan and the trials that ended before to hooks and trackers."""
    trackers = Trackers(report_to, folder.path, started, hooks.notice)
    selection = Selection(folder, started, strategy, Hooks([hooks, trackers]), options)
    trackers.catch_up(selection.records.outcomes)
    folder.write_config(started.settings)
    cost = strategy.cost()
    hooks.on_event(
        SelectionPlanned(
            started=started,
            expected_trials=strategy.expected_arms(),
            steps=steps,
            expected_trainings=cost.expected,
            trainings_at_most=cost.maximum,
        )
    )
    if selection.records.outcomes:
        hooks.on_event(RunResumed(outcomes=selection.records.outcomes))
    return selection, trackers
