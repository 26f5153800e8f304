"""A run's journal as evidence: its records by kind, and the decision that they support."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rightrank.decide.rule import decide
from rightrank.decide.table import table_of
from rightrank.errors import ResultsError, RunFolderError
from rightrank.records import (
    Decided,
    Decision,
    JournalRecord,
    RunStarted,
    Sample,
    TestEvaluated,
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialOutcome,
    TrialStarted,
)


@dataclass(slots=True)
class Records:
    """The journal's records, sorted by kind."""

    started: RunStarted
    outcomes: list[TrialOutcome]
    tests: list[TestEvaluated]
    samples: list[Sample]

    @classmethod
    def of(cls, started: RunStarted, records: Sequence[JournalRecord]) -> Records:
        return cls(
            started,
            [record for record in records if isinstance(record, TrialFinished | TrialDiverged | TrialFailed)],
            [record for record in records if isinstance(record, TestEvaluated)],
            [record for record in records if isinstance(record, Sample)],
        )

    def finished(self) -> list[TrialFinished]:
        return [outcome for outcome in self.outcomes if isinstance(outcome, TrialFinished)]


def records_of(journal: Sequence[JournalRecord], where: str) -> Records:
    """The records of a journal that was read; `where` names it in complaints.

    Raises:
        RunFolderError: empty, or the first line is not a run's start.
    """
    if not journal or not isinstance(journal[0], RunStarted):
        raise RunFolderError(f"{where}: no run has started here; give a folder that `rightrank select --out` made")
    return Records.of(journal[0], journal)


def last_decided(journal: Sequence[JournalRecord]) -> Decided | None:
    """What was handed over last, if the run came so far."""
    return next((record for record in reversed(journal) if isinstance(record, Decided)), None)


def running_trial(journal: Sequence[JournalRecord]) -> TrialStarted | None:
    """The trial that began last and has not ended."""
    ended = {record.trial_id for record in journal if isinstance(record, TrialFinished | TrialDiverged | TrialFailed)}
    begun = [record for record in journal if isinstance(record, TrialStarted) and record.trial_id not in ended]
    return begun[-1] if begun else None


def decide_run(records: Records) -> Decision:
    """The decision of a run's records: at the run's own margin, metric and kind of loss.

    Raises:
        ResultsError: fewer than two ranks have a finished trial.
    """
    started = records.started
    margin = started.settings.get("margin")
    return decide(
        table_of(records.outcomes, started.metric),
        float(margin) if isinstance(margin, int | float) else None,
        token_loss=started.data.form != "classification",
    )


def decision_so_far(records: Records) -> Decision | None:
    """The decision, or None while fewer than two ranks have ended with a result."""
    try:
        return decide_run(records)
    except ResultsError:
        return None
