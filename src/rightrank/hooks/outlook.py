"""What a selection will find and cost, in lines for a person before its first trial, and at the end what it took."""

from __future__ import annotations

from rightrank.hooks.preflight import adapter_lines, clock_of, kind_lines, preflight_of
from rightrank.report.format import duration
from rightrank.report.tables import labels_line, memory_lines, precision_lines, took_line
from rightrank.runs.hook import Hook, Run
from rightrank.runs.prepare import Prepared
from rightrank.runs.returns import Selected
from rightrank.schema.events import Event, RunStarted, SelectionPlanned, TimeExpected
from rightrank.schema.results import SelectionCost
from rightrank.schema.settings import SelectSettings
from rightrank.search.history import seconds_of, steps_of
from rightrank.search.protocol import Strategy
from rightrank.train.metrics import end_metrics

MIN_STEPS = 30  # of a training; the measured steps of a shorter one would be a noticeable part of it


class Outlook(Hook):
    """Tells what the selection will cost and can show; where trainings are long, by a few steps that are measured."""

    ends_run = False

    def __init__(self) -> None:
        self._run: Run | None = None
        self._cost: SelectionCost | None = None  # None: this device has no measurement

    def on_prepared(self, run: Run) -> None:
        self._run = run

    def on_event(self, event: Event) -> None:
        if isinstance(event, SelectionPlanned) and self._run is not None and self._run.prepared is not None:
            self._announce(self._run, self._run.prepared)

    def on_end(self, run: Run, _selected: Selected) -> None:
        """Compare what the run took with what was estimated."""
        if self._cost is None:
            return
        finished, history = run.records.finished(), run.history
        steps = sum(steps_of(trial.arm, history) for trial in finished)
        seconds = sum(seconds_of(trial, history) for trial in finished)
        run.notice(took_line(self._cost, steps / self._cost.steps, seconds))

    def _announce(self, run: Run, prepared: Prepared) -> None:
        # A trial that has ended gives its time.
        ended = any(trial.rank > 0 for trial in run.records.finished())
        clock = clock_of(prepared) if prepared.steps >= MIN_STEPS and not ended else None
        lines = [cost_line(run.strategy, prepared.steps)]
        if clock is not None:
            self._cost = cost = clock.cost(run.strategy)
            lines.append(time_line(cost, clock.basis, prepared.settings.budget_hours))
            run.on_event(TimeExpected(expected_seconds=cost.expected.seconds or 0.0))
        found = preflight_of(prepared, run.strategy, clock)
        lines = [labels_line(found), *memory_lines(found), *lines, *precision_lines(found)]
        for line in [*lines, *kind_lines(prepared), *adapter_lines(prepared)]:
            run.notice(line)
        if end_metrics(prepared.settings):
            run.notice(answers_line(prepared.settings, prepared.started))


def time_line(cost: SelectionCost, measured: str, budget_hours: float | None) -> str:
    """The expected and the largest time of the selection, within its budget."""
    expected, most = cost.expected.seconds, cost.most.seconds
    assert expected is not None
    assert most is not None
    basis = f"measured before the start: {measured}, then discarded"
    if budget_hours is not None and most > budget_hours * 3600:
        allowed = budget_hours * 3600
        without = "" if expected <= allowed else f"; without the budget of time about {duration(expected)}"
        return f"time: about {duration(min(expected, allowed))}, at most {duration(allowed)}{without} ({basis})"
    return f"time: about {duration(expected)}, at most {duration(most)} ({basis})"


def answers_line(settings: SelectSettings, started: RunStarted) -> str:
    """When the metrics besides the loss are measured, and on how many examples."""
    names = [spec.name for spec in settings.metric_specs if not spec.is_measured_along]
    examples = started.data.splits["selection"].items
    return (
        f"{', '.join(names)}: measured on the base, at the end of each training, and on the test split: "
        f"{examples} examples, at most {settings.max_new_tokens} new tokens each where the model writes; the time is reported after the base"
    )


def cost_line(strategy: Strategy, steps: int) -> str:
    cost = strategy.cost()
    if cost.expected == cost.maximum:
        return f"strategy {strategy.name}: {cost.maximum:.3g} trainings of {steps} steps"
    first = f"; the adapter after about {cost.to_adapter:.3g}" if cost.to_adapter < cost.expected else ""
    return (
        f"strategy {strategy.name}: about {cost.expected:.3g} trainings of {steps} steps, {cost.maximum:.3g} at most "
        f"(one stopped early counts for its part){first}"
    )
