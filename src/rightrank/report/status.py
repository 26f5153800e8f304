"""Describe the state of a run for `rightrank status`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from pydantic import Field

from rightrank.report.answer import Answers, build_answer_view, format_cost
from rightrank.report.terminal_curve import Points
from rightrank.schema.command import build_resume_command
from rightrank.schema.events import DecisionRecorded, JournalRecord, Records
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
    sentence: str | None = None  # the answer about the training rank
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
    answers: Answers,
    commands: Sequence[str | None] = (),
    *,
    is_locked: bool,
    progress: Mapping[str, object],
    curves: tuple[Points, Points] = ((), ()),
) -> RunStatus:
    """Build the status of a run.

    Args:
        answers: the answers so far.
        commands: the commands of the next runs, in the same order.
        is_locked: whether a process holds the run folder.
        progress: the content of the progress file; empty if there is none.
        curves: the values of each rank, trained and truncated.
    """
    at, decision, goal = progress.get("at"), answers.decision, answers.goal
    is_fresh = isinstance(at, str) and (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds() < STALE_SECONDS
    adapter = answers.adapter.answer if answers.adapter else None
    view = build_answer_view(answers, commands)
    is_done = find_last_decision(journal) is not None or (goal != "training-rank" and adapter is not None)
    state = "running" if is_locked else "done" if is_done else "stopped"
    started = records.started
    can_resume = state != "done" and not started.is_custom_trainer
    return RunStatus(
        run=run,
        state=state,
        goal=goal,
        trainings=records.count_trainings(),
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
        sentence=view.training_rank if decision is not None else None,
        verdict=decision.verdict if decision is not None else None,
        next_runs=[sentence for sentence, _ in view.next_runs],
        next_commands=[command for _, command in view.next_runs],
        metric=started.metric,
        higher_is_better=started.higher_is_better,
        curve=list(curves[0]),
        truncated_curve=list(curves[1]),
    )


def _format_active_trial(journal: Sequence[JournalRecord], records: Records) -> str | None:
    """Describe the trial that started last and has not ended, with the last value that its trainer reported."""
    ended = {record.trial_id for record in journal if isinstance(record, OUTCOMES)}
    unfinished = [record for record in journal if isinstance(record, TrialStarted) and record.trial_id not in ended]
    if not unfinished:
        return None
    evaluations, label = records.evaluations.get(unfinished[-1].trial_id), unfinished[-1].arm.format_label()
    return f"{label}, step {evaluations[-1].step}: held-out {evaluations[-1].value:.4g}" if evaluations else label


def find_last_decision(journal: Sequence[JournalRecord]) -> DecisionRecorded | None:
    return next((record for record in reversed(journal) if isinstance(record, DecisionRecorded)), None)
