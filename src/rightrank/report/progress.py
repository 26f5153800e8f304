"""What a selection prints before its first training, and its progress: ended and running trials, and the remaining time.

Trials that share a forward pass each count an equal share of its time. The shares add up to the wall time, so the sum
over the remaining work is the remaining time, however many adapters train per pass.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rightrank.report.format import format_bytes, format_duration, format_quantity
from rightrank.schema.events import (
    DataSummary,
    EvaluationProgress,
    Event,
    RunStarted,
    SelectionPlanned,
    StepDone,
)
from rightrank.schema.trials import (
    Arm,
    ArmFields,
    TrialDiverged,
    TrialEvaluated,
    TrialFailed,
    TrialFinished,
    TrialOutcome,
    TrialStarted,
)

if TYPE_CHECKING:
    from rightrank.schema.results import Preflight, PreflightCost


class Progress:
    """Follows a selection by its events, and reports its progress as text and in seconds."""

    def __init__(self) -> None:
        self._expected = 0.0  # trainings
        self._full_steps = 0  # steps of a full training; 0: a custom trainer chooses the number
        self._trainings = 0.0  # ended ones, where a stage counts as a fraction
        self._seconds = 0.0  # of them
        self._ended: dict[str, tuple[int, float]] = {}  # by trial: its last step, and its seconds as in `StepDone`
        self._running: dict[str, TrialStarted] = {}
        self._reports: dict[str, StepDone | TrialEvaluated] = {}  # the last one of each running trial
        self._evaluation: EvaluationProgress | None = None  # an evaluation outside of trials

    def record_event(self, event: Event) -> str | None:
        """Record the event; return a line for the log if a training ended. The final screen shows the truncations."""
        match event:
            case SelectionPlanned():
                self._record_plan(event)
            case EvaluationProgress():
                self._evaluation = event
            case TrialStarted():
                self._evaluation = None
                self._running[event.trial_id] = event
            case StepDone() | TrialEvaluated() if event.trial_id in self._running:
                self._reports[event.trial_id] = event
            case TrialFinished() | TrialDiverged() | TrialFailed():
                seconds = self._record_end(event)
                if event.is_direct or not isinstance(event, TrialFinished):
                    return _format_outcome(event, seconds)
        return None

    def _record_plan(self, planned: SelectionPlanned) -> None:
        """Record the planned trainings, and the trials that ended before this process began.

        A run that was continued with a higher rank begins with a training at it, so the expected trainings are still to come.
        """
        self._full_steps = planned.steps
        self._expected = planned.expected_trainings
        for outcome in planned.outcomes:
            self._record_end(outcome)
        top = max(planned.started.select_settings.ranks)
        if self._trainings > 0 and not any(outcome.rank == top for outcome in planned.outcomes):
            self._expected += self._trainings

    def _record_end(self, outcome: TrialOutcome) -> float:
        """Record an outcome; return the seconds of this trial alone."""
        self._running.pop(outcome.trial_id, None)
        report = self._reports.pop(outcome.trial_id, None)
        seconds = report.seconds if isinstance(report, StepDone) else 0.0
        if isinstance(outcome, TrialFinished):
            seconds = outcome.seconds
        trainings, added_seconds = self._measure(outcome, outcome.end, seconds)
        self._ended[outcome.trial_id] = outcome.end, seconds
        self._trainings += trainings
        self._seconds += added_seconds if outcome.rank > 0 else 0.0
        return added_seconds

    def _measure(self, arm: ArmFields, step: int, seconds: float) -> tuple[float, float]:
        """Return the trainings, as a fraction, and the seconds that an arm has added at this step to the arm that it continues."""
        previous_step, previous_seconds = self._ended.get(arm.continue_from or "", (0, 0.0))
        trainings = max(0, step - previous_step) / self._full_steps if self._full_steps else float(arm.rank > 0)
        return trainings, max(0.0, seconds - previous_seconds)

    def _measure_all(self) -> tuple[float, float]:
        """Return the trainings so far, with running ones in proportion to their steps, and their seconds."""
        trainings, seconds = self._trainings, self._seconds
        for report in self._reports.values():
            if isinstance(report, StepDone):
                arm = self._running[report.trial_id]
                added_trainings, added_seconds = self._measure(arm, report.step, report.seconds)
                trainings += added_trainings
                seconds += added_seconds
        return trainings, seconds

    def estimate_remaining_seconds(self) -> float | None:
        """Estimate the seconds left at the pace so far; None before the first step."""
        trainings, seconds = self._measure_all()
        return max(0.0, self._expected - trainings) * seconds / trainings if trainings and seconds else None

    def format_progress(self) -> str:
        """Return what is evaluated, or the trainings so far, what is running and the time left; empty before the plan."""
        if (work := self._evaluation) is not None:
            remaining_text = format_duration(work.seconds / work.examples * (work.total_examples - work.examples))
            return f"{work.label}: {work.examples:,} of {work.total_examples:,} examples, about {remaining_text} left"
        trainings, remaining = self._measure_all()[0], self.estimate_remaining_seconds()
        position = f"{trainings:.1f} of about {self._expected:.1f} trainings"
        if trainings > self._expected:
            position = f"{trainings:.1f} trainings, more than the {self._expected:.1f} expected"
        # The planned trainings can be done while truncations remain, which are not planned.
        time_left = [f"about {format_duration(remaining)} left"] if remaining is not None and remaining >= 1 else []
        return " · ".join([*[position] * bool(self._expected), *self._format_running(), *time_left])

    def _format_running(self) -> list[str]:
        """Return the first running arm, the number of the others, and its step or evaluation."""
        if not self._running:
            return []
        trial_id, arm = next(iter(self._running.items()))
        others = f" and {len(self._running) - 1} more" if len(self._running) > 1 else ""
        report = self._reports.get(trial_id)
        texts = [f"{_name_arm(arm.arm)}{others}"]
        if isinstance(report, StepDone):
            texts.append(f"step {report.step}/{report.steps}, loss {report.loss:.3f}")
        elif report is not None:
            texts.append(f"step {report.step}, held-out {report.value:.4g}")
        return texts


def _format_outcome(outcome: TrialOutcome, seconds: float) -> str:
    if isinstance(outcome, TrialFinished):
        text = f"held-out {outcome.value:.4f}" + (f" ({outcome.value_metric})" if outcome.value_metric else "")
    else:
        text = outcome.end_text
    stage = outcome.arm.format_stage()
    return f"{_name_arm(outcome.arm):<38} {text}  ({stage + ', ' if stage else ''}{format_duration(seconds)})"


def _name_arm(arm: Arm) -> str:
    if arm.rank == 0:
        return "base model" if arm.is_direct else "base with the trained head"
    seed = f", seed {arm.seed}" if arm.seed else ""
    return f"rank {arm.rank}, learning rate {arm.learning_rate:g}{seed}"


def format_preflight(preflight: Preflight) -> str:
    """Format the complete preflight."""
    splits = ", ".join(f"{split.examples:,} {name}" for name, split in preflight.splits.items())
    split_source = "given splits" if preflight.splits_given else "split by content"
    data = [
        f"data ({preflight.form}, {split_source}): {splits} examples",
        *(f"  {line}" for line in preflight.left_out),
    ]
    labels = ", ".join(f"{split.label_tokens:,} {name}" for name, split in preflight.splits.items())
    longest = f"longest example: {preflight.longest} tokens of at most {preflight.seq_len}"
    work = [f"label tokens: {labels}; {longest}", format_memory(preflight), _format_strategy(preflight.cost)]
    return "\n".join([*data, *work, *preflight.notes, "nothing was written: this was a dry run"])


def format_preflight_cost(preflight: Preflight, time_text: str) -> str:
    """Format trainings, time and the largest memory in a line, which a selection prints before it starts."""
    needed_bytes = [
        row.needed_bytes for row in preflight.ranks if row.needed_bytes is not None and row.fits is not False
    ]
    memory = f"{format_bytes(max(needed_bytes))} of memory" if needed_bytes else ""
    return f"cost: {'; '.join(filter(None, [_format_trainings(preflight.cost), time_text, memory]))}"


def _format_trainings(cost: PreflightCost) -> str:
    if cost.trainings == cost.trainings_at_most:
        return f"{format_quantity(round(cost.trainings, 2), 'training')} of {cost.steps} steps"
    return f"about {cost.trainings:.3g} trainings of {cost.steps} steps, {cost.trainings_at_most:.3g} at most"


def _format_strategy(cost: PreflightCost) -> str:
    to_adapter = cost.trainings_to_adapter
    first = f"; the adapter after about {to_adapter:.3g}" if to_adapter < cost.trainings else ""
    counted = (
        "" if cost.trainings == cost.trainings_at_most else " (a training that is stopped early counts as a fraction)"
    )
    return f"strategy {cost.strategy}: {_format_trainings(cost)}{counted}{first}"


def format_memory(preflight: Preflight) -> str:
    """List the ranks with their memory, and the budget."""
    planned_rows = [(row, row.needed_bytes) for row in preflight.ranks if row.needed_bytes is not None]
    if not planned_rows:
        return (
            f"ranks: {', '.join(str(row.rank) for row in preflight.ranks)} (memory not planned for this architecture)"
        )
    rank_texts = ", ".join(
        f"{row.rank} ({format_bytes(needed_bytes)}{'' if row.fits is not False else ', does not fit'})"
        for row, needed_bytes in planned_rows
    )
    budget = (
        "no budget given" if preflight.memory_bytes is None else f"{format_bytes(preflight.memory_bytes)} available"
    )
    return f"ranks and memory: {rank_texts}; {budget}"


def format_time_estimate(expected_seconds: float, max_seconds: float, budget_hours: float | None) -> str:
    """Describe the expected and the largest time of the selection, limited by its time budget."""
    limit = math.inf if budget_hours is None else 3600 * budget_hours
    text = f"about {format_duration(min(expected_seconds, limit))}, at most {format_duration(min(max_seconds, limit))}"
    beyond = f", without the time budget about {format_duration(expected_seconds)}"
    return text + (beyond if expected_seconds > limit else "")


def format_plan(started: RunStarted, steps: int) -> str:
    if started.data.form == "custom":
        better = "higher" if started.higher_is_better else "lower"
        length = f"trainings of {steps} steps" if steps else "the trainer sets the length of a training"
        return f"trainer {started.settings['trainer']}, by {started.metric} ({better} is better); {length}"
    splits = started.data.splits
    counts = ", ".join(f"{summary.examples} {name}" for name, summary in splits.items())
    notes = describe_data_issues(started.data)
    read = f"{started.data.rows:,} rows; " if started.data.rows else ""
    form = started.data.form + (f" (from {started.data.shape})" if started.data.shape else "")
    return (
        f"{read}examples: {counts}{' (' + '; '.join(notes) + ')' if notes else ''}; form: {form}; "
        f"trainings of {steps} steps on {started.environment['device']}"
    )


def describe_data_issues(data: DataSummary) -> list[str]:
    """Describe, with their counts, the rows that were left out, cut or look doubtful."""
    splits = data.splits.values()
    counts = (
        (data.repeated, "duplicate held-out rows left out"),
        (data.not_evaluated, "held-out rows not evaluated, beyond --max-eval-examples"),
        (sum(summary.truncated for summary in splits), "cut to the maximum length"),
        (sum(summary.dropped for summary in splits), "dropped because no label token is left"),
        (data.equal_pairs, "pairs left out because `chosen` and `rejected` are the same"),
        (
            sum(summary.equal for summary in splits),
            "pairs left out because both answers are the same within the maximum length",
        ),
        (data.unreadable, "rows skipped because of lone surrogates, which no tokenizer accepts"),
        (
            data.groups,
            f"groups of validation examples (rows with one `{data.grouped_by}`), which the bounds treat as units",
        ),
        (data.groups_across_splits, f"held-out groups (`{data.grouped_by}`) that also have rows in the training split"),
        (
            data.duplicates_across_splits,
            "of the held-out examples also in another split (exact duplicates across splits), which favours high ranks",
        ),
        (
            data.near_duplicates_across_splits,
            "of the held-out examples differing from a training example only in white space or case, which favours high ranks",
        ),
    )
    unused_columns = [f"columns not used: {', '.join(data.unused_columns)}"] if data.unused_columns else []
    return [*(f"{count:,} {description}" for count, description in counts if count), *unused_columns]
