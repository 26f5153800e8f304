"""What a selection prints before its first training, and its progress: ended and running trials, and the remaining time.

Trials that share a forward pass each count an equal share of its time. The shares add up to the wall time, so the sum
over the remaining work is the remaining time, however many adapters train per pass.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rightrank.report.format import format_bytes, format_duration, format_metric_label, format_quantity
from rightrank.schema.events import (
    DataSummary,
    DurationEstimated,
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


@dataclass(slots=True)
class _RunningTrial:
    """A running trial."""

    arm: TrialStarted
    since: float  # by the monotonic clock
    step: StepDone | None = None  # the last step
    evaluation: TrialEvaluated | None = None  # the last report of a custom trainer


class Progress:
    """Follows a selection by its events, and reports its progress as text and in seconds."""

    def __init__(self) -> None:
        self._expected = 0.0  # trainings
        self._first_pace: float | None = None  # expected seconds of a full training, used before the first step
        self._full_steps = 0  # steps of a full training; 0: a custom trainer chooses the number
        self._spent = 0.0  # ended trainings, where a stage counts as a fraction
        self._running: dict[str, _RunningTrial] = {}
        # By trial: the last step, and the seconds including those of the trial that it continued.
        self._ended: dict[str, tuple[int, float]] = {}
        self._costs: list[float] = []  # seconds of each training
        self._evaluation: EvaluationProgress | None = None  # an evaluation outside of trials
        self._metric, self._higher_is_better = "loss", False
        self._best: dict[int, float] = {}
        self._truncated: dict[int, float] = {}
        self._peak_bytes = 0

    def record_event(self, event: Event) -> str | None:
        """Record the event; return a line for the log if a training ended. The final screen shows the truncations."""
        match event:
            case SelectionPlanned():
                self._record_plan(event)
            case DurationEstimated() if self._expected:
                self._first_pace = event.expected_seconds / self._expected
            case EvaluationProgress():
                self._evaluation = event
            case TrialStarted():
                self._evaluation = None
                self._running[event.trial_id] = _RunningTrial(event, time.monotonic())
            case StepDone() if event.trial_id in self._running:
                self._running[event.trial_id].step = event
            case TrialEvaluated() if event.trial_id in self._running:
                self._running[event.trial_id].evaluation = event
            case TrialFinished() | TrialDiverged() | TrialFailed():
                line = self._format_outcome(event)
                return line if event.arm.is_direct or not isinstance(event, TrialFinished) else None
        return None

    def _record_plan(self, planned: SelectionPlanned) -> None:
        """Record the planned trainings, and the trials that ended before this process began.

        A run that was continued with a higher rank begins with a training at it, so the expected trainings are still to come.
        """
        self._full_steps = planned.steps
        self._expected = planned.expected_trainings
        self._metric, self._higher_is_better = planned.started.metric, planned.started.higher_is_better
        for outcome in planned.outcomes:
            self._record_end(outcome)
        top = max(planned.started.select_settings.ranks)
        if self._spent > 0 and not any(outcome.rank == top for outcome in planned.outcomes):
            self._expected += self._spent

    def get_curves(self) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """Return the best trained value of each rank so far, and the best truncation."""
        return sorted(self._best.items()), sorted(self._truncated.items())

    def format_curve_label(self) -> str:
        """Return the name of the values of `get_curves`, with the better direction."""
        return format_metric_label(self._metric, self._higher_is_better)

    def format_progress(self) -> str:
        if (work := self._evaluation) is not None:
            remaining_text = format_duration(work.seconds / work.examples * (work.total_examples - work.examples))
            return f"{work.label}: {work.examples:,} of {work.total_examples:,} examples, about {remaining_text} left"
        remaining = self.estimate_remaining_seconds()
        # The planned trainings can be done while truncations remain, which are not planned.
        time_left = [f"about {format_duration(remaining)} left"] if remaining is not None and remaining >= 1 else []
        return " · ".join([self._format_position(), *self._format_running(), *time_left])

    def format_best_rank(self) -> str:
        """Return the best rank so far and the peak memory; empty before the first result."""
        if not self._best:
            return ""
        pick = max if self._higher_is_better else min
        rank = pick(self._best, key=lambda rank: self._best[rank])
        memory = f" · peak memory {format_bytes(self._peak_bytes)}" if self._peak_bytes else ""
        return f"best so far: rank {rank} ({self._best[rank]:.4f}){memory}"

    def estimate_remaining_seconds(self) -> float | None:
        """Estimate the seconds left for running and, at the mean cost, for future trials; None before the first step."""
        pace = self._estimate_pace()
        if pace is None:
            return None
        shares = sum(self._compute_share(trial.arm, trial.arm.end) for trial in self._running.values())
        to_come = max(0.0, self._expected - self._spent - shares)
        return to_come * pace + sum(_estimate_seconds_left(trial, pace) for trial in self._running.values())

    def _estimate_pace(self) -> float | None:
        """Return the seconds of a full training with its evaluations: from ended trials, from running ones, or as expected."""
        if self._costs and self._spent > 0:
            return sum(self._costs) / self._spent
        steps = [trial.step for trial in self._running.values() if trial.step is not None and trial.step.step > 0]
        if not steps or not self._full_steps:
            return self._first_pace
        return self._full_steps * sum(step.seconds / step.step for step in steps) / len(steps)

    def _compute_share(self, arm: ArmFields, until: int) -> float:
        """Return the trainings, as a fraction, that an arm adds up to step `until` to the arm that it continues."""
        previous_step, _ = self._ended.get(arm.continue_from or "", (0, 0.0))
        return max(0, until - previous_step) / self._full_steps if self._full_steps else float(arm.rank > 0)

    def _format_position(self) -> str:
        """Return `1.4 of about 3.8 trainings`, with running trials in proportion."""
        spent = self._spent
        if self._full_steps:
            spent += sum(
                self._compute_share(trial.arm, trial.step.step)
                for trial in self._running.values()
                if trial.step is not None
            )
        if not self._expected:
            return "measuring before the first training"
        if spent > self._expected:
            return f"{spent:.1f} trainings, more than the {self._expected:.1f} expected"
        return f"{spent:.1f} of about {self._expected:.1f} trainings"

    def _format_running(self) -> list[str]:
        """Return the running arms, and the step or the evaluation of the slowest one."""
        running = list(self._running.values())
        if not running:
            return []
        if len(running) == 1:
            arm = running[0].arm.arm
            label = _name_base(arm) if arm.rank == 0 else f"rank {arm.rank}, learning rate {arm.learning_rate:g}"
        else:
            ranks = sorted({trial.arm.rank for trial in running})
            label = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        if steps := [trial.step for trial in running if trial.step is not None]:
            slowest = min(steps, key=lambda step: step.step / step.steps)
            return [label, f"step {slowest.step}/{slowest.steps}, loss {slowest.loss:.3f}"]
        if evaluations := [trial.evaluation for trial in running if trial.evaluation is not None]:
            evaluation = min(evaluations, key=lambda evaluation: evaluation.step)
            return [label, f"step {evaluation.step}, held-out {evaluation.value:.4g}"]
        return [label]

    def _record_end(self, event: TrialOutcome) -> float:
        """Record an outcome; return the seconds of this trial alone."""
        running = self._running.pop(event.trial_id, None)
        total = running.step.seconds if running is not None and running.step is not None else 0.0
        if isinstance(event, TrialFinished):
            total = event.seconds
            self._peak_bytes = max(self._peak_bytes, event.peak_bytes)
            if event.rank > 0 and event.stop_at is None:
                values = self._best if event.arm.is_direct else self._truncated
                better = max if self._higher_is_better else min
                values[event.rank] = better(event.value, values.get(event.rank, event.value))
        self._spent += self._compute_share(event, event.end)
        _, previous_seconds = self._ended.get(event.continue_from or "", (0, 0.0))
        self._ended[event.trial_id] = event.end, total
        seconds = max(0.0, total - previous_seconds)
        if event.rank > 0 and total > 0:
            self._costs.append(seconds)
        return seconds

    def _format_outcome(self, event: TrialOutcome) -> str:
        if isinstance(event, TrialFinished):
            text = f"held-out {event.value:.4f}" + (f" ({event.value_metric})" if event.value_metric else "")
            if event.rank == 0 and event.answer_seconds >= 1:
                text += f"; generating answers took {format_duration(event.answer_seconds)}, and will take as long after each training"
        else:
            text = event.end_text
        seconds = self._record_end(event)
        name = (
            _name_base(event.arm)
            if event.rank == 0
            else f"rank {event.rank:>3}  lr {event.learning_rate:<7g} seed {event.seed}"
        )
        stage = event.arm.format_stage()
        return f"{name:<32} {text}  ({stage + ', ' if stage else ''}{format_duration(seconds)})"


def _name_base(arm: Arm) -> str:
    return "base model" if arm.is_direct else "base with the trained head"


def _estimate_seconds_left(trial: _RunningTrial, pace: float) -> float:
    """Estimate the seconds left of a trial. A custom trainer reports no steps, so `pace`, that of a full training, is used."""
    if trial.arm.rank == 0:
        return 0.0
    if trial.step is None:
        return max(0.0, pace - (time.monotonic() - trial.since))
    return trial.step.seconds / trial.step.step * max(0, trial.arm.end - trial.step.step)


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
    """Describe the expected and the largest number of trainings."""
    if cost.trainings == cost.trainings_at_most:
        return f"{format_quantity(round(cost.trainings, 2), 'training')} of {cost.steps} steps"
    return f"about {cost.trainings:.3g} trainings of {cost.steps} steps, {cost.trainings_at_most:.3g} at most"


def _format_strategy(cost: PreflightCost) -> str:
    """Describe the strategy, with its number of trainings."""
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
    if budget_hours is None or max_seconds <= budget_hours * 3600:
        return f"about {format_duration(expected_seconds)}, at most {format_duration(max_seconds)}"
    budget_seconds = budget_hours * 3600
    text = f"about {format_duration(min(expected_seconds, budget_seconds))}, at most {format_duration(budget_seconds)}"
    return (
        text
        if expected_seconds <= budget_seconds
        else f"{text}, without the time budget about {format_duration(expected_seconds)}"
    )


def format_plan(started: RunStarted, steps: int) -> str:
    if started.data.form == "custom":
        better = "higher" if started.higher_is_better else "lower"
        length = f"trainings of {steps} steps" if steps else "the trainer sets the length of a training"
        return f"trainer {started.trainer}, by {started.metric} ({better} is better); {length}"
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
            "held-out examples are also in another split (exact duplicates across splits), which favours high ranks",
        ),
        (
            data.near_duplicates_across_splits,
            "held-out examples differ from a training example only in white space or case, which favours high ranks",
        ),
    )
    unused_columns = [f"columns not used: {', '.join(data.unused_columns)}"] if data.unused_columns else []
    return [*(f"{count:,} {description}" for count, description in counts if count), *unused_columns]
