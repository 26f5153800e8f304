"""The state of a run for `rightrank status`, and what its trials cost."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from pydantic import Field

from rightrank.decision.next_run import next_commands
from rightrank.decision.records import Records, answers_of, decision_so_far, trainings
from rightrank.report.answer import answer_view, labelled
from rightrank.report.evidence_tables import cost_sentence
from rightrank.report.figure import metric_label
from rightrank.report.format import quantity
from rightrank.report.terminal import terminal_curve
from rightrank.schema.command import measure_command
from rightrank.schema.events import DecisionRecorded, JournalRecord, RunStarted
from rightrank.schema.settings import Goal
from rightrank.schema.trials import OUTCOMES, Record, TrialStarted

NO_ANSWER = "no answer yet"
STALE_SECONDS = 600  # an older progress file belongs to a process that ended, or to one very long step


class RunStatus(Record):
    """The state of a run: from its journal, and from its process if one is at work."""

    run: str
    state: str  # running, stopped (unfinished, and no process works on it), done
    goal: Goal
    trainings: float  # so far, in whole ones
    trials_ended: int
    trials_without_result: int
    running: str | None  # the trial at work
    resume: str | None  # the command that continues it; None: it is done, or by the call of an own trainer
    progress: str | None  # its step and the time left, as the process reports them
    cost: str
    answer: str
    adapter_sentence: str | None  # the answer to the first question
    rank: int | None
    verdict: str | None
    next_runs: list[str] = Field(default_factory=list)  # every next run, the most useful first
    next_commands: list[str | None] = Field(default_factory=list)  # each of them as a command that can be pasted
    metric: str  # of the values of both curves
    higher_is_better: bool
    curve: list[tuple[int, float]]  # of the trained ranks
    truncated_curve: list[tuple[int, float]]  # of the truncations: the best of each rank


def run_status(
    run: str,
    journal: Sequence[JournalRecord],
    records: Records,
    goal: Goal,
    locked: bool,
    progress: Mapping[str, object],
) -> RunStatus:
    """The state of a run.

    Args:
        goal: of the last `select`.
        locked: a process holds the folder.
        progress: the content of its progress file; empty without one.
    """
    decided, at = last_decided(journal), progress.get("at")
    is_fresh = isinstance(at, str) and (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds() < STALE_SECONDS
    decision = decision_so_far(records) if decided is None else decided.decision
    adapter = records.adapters[-1].answer if records.adapters else None
    if goal == "adapter":
        decision = None
    answers = answers_of(records, decision, goal)
    commands = next_commands(records.started, answers.next_runs, run)
    view = answer_view(answers, commands)
    is_done = decided is not None or (goal == "adapter" and adapter is not None)
    state = "running" if locked else "done" if is_done else "stopped"
    return RunStatus(
        run=run,
        state=state,
        goal=goal,
        trainings=trainings(records),
        trials_ended=len(records.outcomes),
        trials_without_result=len(records.outcomes) - len(records.finished()),
        running=_at_work(journal, records) if locked else None,
        resume=None if state == "done" else _resume(records.started, run),
        progress=str(progress["progress"]) if locked and is_fresh and "progress" in progress else None,
        cost=cost_sentence(records),
        answer=NO_ANSWER if decision is None and adapter is None else view.headline,
        adapter_sentence=None if adapter is None else adapter.sentence,
        rank=decision.rank if decision is not None else None,
        verdict=decision.verdict if decision is not None else None,
        next_runs=[sentence for sentence, _ in view.next_runs],
        next_commands=commands,
        metric=records.started.metric,
        higher_is_better=records.started.higher_is_better,
        curve=[(e.rank, e.value) for e in decision.ranks if e.rank > 0] if decision else _best_by_rank(records, True),
        truncated_curve=_best_by_rank(records, False),
    )


def _resume(started: RunStarted, run: str) -> str | None:
    """The command that resumes a run; the end of a training has one of its own, and a function is called again."""
    if not started.is_own:
        return shlex.join(["rightrank", "select", "--out", run])
    return measure_command(run) if started.is_end else None


def _at_work(journal: Sequence[JournalRecord], records: Records) -> str | None:
    """The arm that began last and has not ended, and the last value that its trainer reported."""
    ended = {record.trial_id for record in journal if isinstance(record, OUTCOMES)}
    begun = [record for record in journal if isinstance(record, TrialStarted) and record.trial_id not in ended]
    if not begun:
        return None
    looks, label = records.looks.get(begun[-1].trial_id), begun[-1].arm.label()
    return f"{label}, step {looks[-1].step}: held-out {looks[-1].value:.4g}" if looks else label


def status_lines(status: RunStatus, width: int) -> str:
    """The status as text."""
    so_far = "" if status.state == "done" or "not known yet" in status.answer else " so far"
    verdict = f" ({status.verdict})" if status.rank is not None else ""
    rows: list[tuple[str, str | None]] = [
        ("cost", status.cost),
        ("answer", f"{status.answer}{so_far if status.answer != NO_ANSWER else ''}{verdict}"),
        ("", status.adapter_sentence),
        *(
            row
            for sentence, command in zip(status.next_runs, status.next_commands, strict=True)
            for row in (("next", sentence), ("", command))
        ),
        ("now", status.progress or status.running),
    ]
    if status.state == "stopped":
        rows.append(("resume", status.resume))
    first = f"{status.run}: {status.state}, {quantity(status.trainings, 'training')}{so_far}"
    label = metric_label(status.metric, status.higher_is_better)
    curve = terminal_curve(status.curve, width, status.truncated_curve, label=label)
    lines = labelled(rows, 8)
    return "\n".join([first, *lines, *([curve] if curve else [])])


def _best_by_rank(records: Records, trained: bool) -> list[tuple[int, float]]:
    """The best value of each rank: of whole trainings, or of truncations."""
    best: dict[int, float] = {}
    better = max if records.started.higher_is_better else min
    for trial in records.finished():
        if trial.rank > 0 and trial.stop_at is None and (trial.truncate_from is None) == trained:
            best[trial.rank] = better(trial.value, best.get(trial.rank, trial.value))
    return sorted(best.items())


def last_decided(journal: Sequence[JournalRecord]) -> DecisionRecorded | None:
    return next((record for record in reversed(journal) if isinstance(record, DecisionRecorded)), None)
