"""The state of a run, for `rightrank status` and `rightrank watch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from rightrank.decision.run import Records, decision_so_far, last_decided, running_trial
from rightrank.records import JournalRecord, Record
from rightrank.report.format import quantity
from rightrank.report.sentences import cost_of, headline
from rightrank.report.terminal_figures import terminal_curve

STALE_SECONDS = 600  # an older progress file belongs to a process that ended, or to one very long step


class RunStatus(Record):
    """The state of a run: from its journal, and from its process if one is at work."""

    run: str
    state: str  # running, stopped (unfinished, and no process works on it), done
    trials_ended: int
    trials_without_result: int
    running: str | None  # the trial at work
    progress: str | None  # its step and the time left, as the process reports them
    cost: str
    answer: str
    rank: int | None
    verdict: str | None
    next_run: str | None
    curve: list[tuple[int, float]]


def run_status(
    run: str, journal: Sequence[JournalRecord], records: Records, locked: bool, progress: Mapping[str, object] | None
) -> RunStatus:
    """The state of a run.

    Args:
        locked: a process holds the folder.
        progress: the content of its progress file, if that is fresh.
    """
    decided, current = last_decided(journal), running_trial(journal)
    decision = decision_so_far(records) if decided is None else decided.decision
    cost = cost_of(records)
    state = "running" if locked else "done" if decided is not None else "stopped"
    return RunStatus(
        run=run,
        state=state,
        trials_ended=len(records.outcomes),
        trials_without_result=cost.without_result,
        running=current.arm.label() if current is not None and locked else None,
        progress=str(progress["progress"]) if progress is not None and locked else None,
        cost=cost.sentence(),
        answer=headline(decision) if decision is not None else "no answer yet",
        rank=decision.rank if decision is not None else None,
        verdict=decision.verdict if decision is not None else None,
        next_run=decision.next_run if decision is not None else None,
        curve=[] if decision is None else [(e.rank, e.value) for e in decision.ranks if e.rank > 0],
    )


def status_lines(status: RunStatus, width: int, colour: bool) -> str:
    """The status as text."""
    so_far = "" if status.state == "done" else " so far"
    lines = [
        f"{status.run}: {status.state}, {quantity(status.trials_ended, 'trial')} ended",
        f"cost:   {status.cost}",
        f"answer: {status.answer}{so_far}" + (f" ({status.verdict})" if status.verdict else ""),
    ]
    if status.next_run:
        lines.append(f"next:   {status.next_run}")
    if status.progress or status.running:
        lines.append(f"now:    {status.progress or status.running}")
    if status.state == "stopped":
        lines.append("run the same `rightrank select` again to resume")
    curve = terminal_curve(status.curve, width, colour)
    return "\n".join([*lines, curve] if curve else lines)


def is_fresh(progress: Mapping[str, object]) -> bool:
    """Whether a progress file was written within `STALE_SECONDS`."""
    at = progress.get("at")
    if not isinstance(at, str):
        return False
    return (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds() < STALE_SECONDS
