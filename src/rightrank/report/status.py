"""Describe the state of a run for `rightrank status`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from pydantic import Field

from rightrank.decision.next_run import build_next_commands
from rightrank.decision.records import (
    Records,
    build_answers,
    count_trainings,
    decide_if_possible,
    list_tried_rates,
)
from rightrank.report.answer import build_answer_view, format_cost, format_labelled_rows
from rightrank.report.format import format_metric_label, format_quantity
from rightrank.report.terminal_curve import draw_terminal_curve
from rightrank.schema.command import build_resume_command
from rightrank.schema.decision import TrainingRankEstimate
from rightrank.schema.events import DecisionRecorded, JournalRecord, RunKind
from rightrank.schema.settings import Goal
from rightrank.schema.trials import OUTCOMES, Record, TrialStarted

NO_ANSWER = "no answer yet"
# An older progress file belongs to a process that has ended, or to a very long step.
STALE_SECONDS = 600


class RunStatus(Record):
    """The state of a run, read from its journal and from its process if one is running."""

    run: str
    state: str  # running, stopped (unfinished without a running process) or done
    goal: Goal
    trainings: float  # so far; a partial training counts as a fraction
    trials_ended: int
    trials_without_result: int
    running: str | None  # the trial that is running
    resume: (
        str | None
    )  # the command that resumes the run; None if it is done or if a custom trainer has to be called again
    progress: str | None  # the current step and the remaining time, as the process reports them
    cost: str
    answer: str
    learning_rate: float | None  # of the adapter
    learning_rate_sentence: str | None  # None if only one was tried
    adapter_sentence: str | None  # the answer about the deployment rank
    adapter_notes: list[str] = Field(
        default_factory=list
    )  # how the adapter was made, what it was tested on, and what to do
    rank: int | None
    sentence: str | None = None  # the answer about the training rank, or its estimate
    verdict: str | None
    next_runs: list[str] = Field(default_factory=list)  # suggested next runs, the most useful first
    next_commands: list[str | None] = Field(default_factory=list)  # the command for each of them, if it can be pasted
    metric: str  # of the values of both curves
    higher_is_better: bool
    curve: list[tuple[int, float]]  # of the trained ranks
    truncated_curve: list[tuple[int, float]]  # of the truncations: the best of each rank


def build_run_status(
    run: str,
    journal: Sequence[JournalRecord],
    records: Records,
    goal: Goal,
    is_locked: bool,
    progress: Mapping[str, object],
    estimate: TrainingRankEstimate | None = None,
) -> RunStatus:
    """Build the status of a run.

    Args:
        goal: the goal of the last `select`.
        is_locked: whether a process holds the run folder.
        progress: the content of the progress file; empty if there is none.
        estimate: of the training rank, if that is not the goal.
    """
    recorded_decision, at = find_last_decision(journal), progress.get("at")
    is_fresh = isinstance(at, str) and (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds() < STALE_SECONDS
    decision = decide_if_possible(records) if recorded_decision is None else recorded_decision.decision
    adapter = records.adapters[-1].answer if records.adapters else None
    if goal != "training-rank":
        decision = None
    answers = build_answers(records, decision, goal, estimate)
    commands = build_next_commands(records.started, answers.next_runs, run, tried_rates=list_tried_rates(records))
    view = build_answer_view(answers, commands)
    is_done = recorded_decision is not None or (goal != "training-rank" and adapter is not None)
    state = "running" if is_locked else "done" if is_done else "stopped"
    started = records.started
    can_resume = state != "done" and (started.kind is RunKind.CALLBACK or not started.is_custom_trainer)
    return RunStatus(
        run=run,
        state=state,
        goal=goal,
        trainings=count_trainings(records),
        trials_ended=len(records.outcomes),
        trials_without_result=len(records.outcomes) - len(records.list_finished()),
        running=_format_active_trial(journal, records) if is_locked else None,
        resume=build_resume_command(run) if can_resume else None,
        progress=str(progress["progress"]) if is_locked and is_fresh and "progress" in progress else None,
        cost=format_cost(records),
        answer=NO_ANSWER if decision is None and adapter is None else view.headline,
        learning_rate=answers.adapter_rate or None,
        learning_rate_sentence=view.learning_rate or None,
        adapter_sentence=None if adapter is None else adapter.sentence,
        adapter_notes=[] if adapter is None else [*view.adapter_notes, *adapter.notes],
        rank=decision.rank if decision is not None else None,
        sentence=" ".join(filter(None, (view.training_rank, view.safe_choice, *view.metrics)))
        if decision is not None
        else view.estimate or None,
        verdict=decision.verdict if decision is not None else None,
        next_runs=[sentence for sentence, _ in view.next_runs],
        next_commands=commands,
        metric=records.started.metric,
        higher_is_better=records.started.higher_is_better,
        curve=[(e.rank, e.value) for e in decision.ranks if e.rank > 0]
        if decision
        else _find_best_by_rank(records, True),
        truncated_curve=_find_best_by_rank(records, False),
    )


def _format_active_trial(journal: Sequence[JournalRecord], records: Records) -> str | None:
    """Describe the trial that started last and has not ended, with the last value that its trainer reported."""
    ended = {record.trial_id for record in journal if isinstance(record, OUTCOMES)}
    unfinished = [record for record in journal if isinstance(record, TrialStarted) and record.trial_id not in ended]
    if not unfinished:
        return None
    evaluations, label = records.evaluations.get(unfinished[-1].trial_id), unfinished[-1].arm.format_label()
    return f"{label}, step {evaluations[-1].step}: held-out {evaluations[-1].value:.4g}" if evaluations else label


def format_status(status: RunStatus, width: int) -> str:
    """Format the status as text."""
    so_far = "" if status.state == "done" or "not known yet" in status.answer else " so far"
    verdict = f" ({status.verdict})" if status.rank is not None else ""
    rows: list[tuple[str, str | None]] = [
        ("cost", status.cost),
        ("answer", f"{status.answer}{so_far if status.answer != NO_ANSWER else ''}{verdict}"),
        ("", status.sentence if status.verdict is not None else None),
        ("", status.adapter_sentence),
        *(("", note) for note in status.adapter_notes),
        ("", status.learning_rate_sentence),
        ("", status.sentence if status.verdict is None else None),
        *(
            row
            for sentence, command in zip(status.next_runs, status.next_commands, strict=True)
            for row in (("next", sentence), ("", command))
        ),
        ("now", status.progress or status.running),
    ]
    if status.state == "stopped":
        rows.append(("resume", status.resume))
    first = f"{status.run}: {status.state}, {format_quantity(status.trainings, 'training')}{so_far}"
    label = format_metric_label(status.metric, status.higher_is_better)
    curve = draw_terminal_curve(status.curve, width, status.truncated_curve, label=label)
    lines = format_labelled_rows(rows, 8)
    return "\n".join([first, *lines, *([curve] if curve else [])])


def _find_best_by_rank(records: Records, is_trained: bool) -> list[tuple[int, float]]:
    """Return the best value of each rank, over complete trainings or over truncations."""
    best: dict[int, float] = {}
    better = max if records.started.higher_is_better else min
    for trial in records.list_finished():
        if trial.rank > 0 and trial.stop_at is None and (trial.truncate_from is None) == is_trained:
            best[trial.rank] = better(trial.value, best.get(trial.rank, trial.value))
    return sorted(best.items())


def find_last_decision(journal: Sequence[JournalRecord]) -> DecisionRecorded | None:
    return next((record for record in reversed(journal) if isinstance(record, DecisionRecorded)), None)
