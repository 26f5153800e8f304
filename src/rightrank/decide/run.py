"""A run's journal as evidence: its records by kind, and the decision that they support."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rightrank.decide.rule import decide
from rightrank.decide.table import Cell, ScoreTable, table_of
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
            last_outcomes(records),
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


def last_outcomes(records: Sequence[JournalRecord]) -> list[TrialOutcome]:
    """How each trial ended; the last word where it was run again."""
    ended = [record for record in records if isinstance(record, TrialFinished | TrialDiverged | TrialFailed)]
    return list({outcome.trial_id: outcome for outcome in ended}.values())


def last_decided(journal: Sequence[JournalRecord]) -> Decided | None:
    """What was handed over last, if the run came so far."""
    return next((record for record in reversed(journal) if isinstance(record, Decided)), None)


def running_trial(journal: Sequence[JournalRecord]) -> TrialStarted | None:
    """The trial that began last and has not ended."""
    ended = {record.trial_id for record in journal if isinstance(record, TrialFinished | TrialDiverged | TrialFailed)}
    begun = [record for record in journal if isinstance(record, TrialStarted) and record.trial_id not in ended]
    return begun[-1] if begun else None


def decide_run(records: Records, outcomes: Sequence[TrialOutcome] | None = None) -> Decision:
    """The decision on `outcomes` (a run's whole trainings unless told): at its margin, metric and kind of loss.

    Raises:
        ResultsError: fewer than two ranks have a finished trial.
    """
    started = records.started
    margin = started.settings.get("margin")
    return decide(
        run_table(records, outcomes),
        float(margin) if isinstance(margin, int | float) else None,
        token_loss=started.data.form not in ("classification", "own"),
    )


def run_table(records: Records, outcomes: Sequence[TrialOutcome] | None = None) -> ScoreTable:
    """The scores of a run, of ours or of a trainer of one's own."""
    started = records.started
    if outcomes is None:
        outcomes = [outcome for outcome in records.outcomes if outcome.arm.is_direct]
    if started.data.form == "own":
        return own_table(records)
    return table_of(outcomes, "accuracy" if started.metric == "accuracy" else "loss")


def own_table(records: Records) -> ScoreTable:
    """Any metric, by items where there are any, else by its one number a trial."""
    metric, sign = records.started.metric, -1 if records.started.higher_is_better else 1
    cells: dict[tuple[int, float, int], Cell] = {}
    missing: dict[int, int] = {}
    for outcome in records.outcomes:
        if not isinstance(outcome, TrialFinished):
            missing[outcome.rank] = missing.get(outcome.rank, 0) + 1
            continue
        scores = np.asarray(outcome.item_scores or [outcome.value], dtype=np.float64)
        weights = np.asarray(outcome.item_weights or np.ones_like(scores), dtype=np.float64)
        cells[outcome.rank, outcome.learning_rate, outcome.seed] = Cell(
            outcome.trial_id, outcome.metrics[metric], sign * scores * weights, weights, outcome.train_value
        )
    return ScoreTable(metric, records.started.higher_is_better, cells, missing)


def best_trial(records: Records, decision: Decision, rank: int) -> TrialFinished:
    """The best seed of a rank at its best rate, by the held-out value."""
    evidence = next(evidence for evidence in decision.ranks if evidence.rank == rank)
    trials = [trial for trial in records.finished() if trial.trial_id in evidence.trial_ids]
    sign = -1 if decision.higher_is_better else 1
    return min(trials, key=lambda trial: (sign * trial.value, trial.seed))


def decision_so_far(records: Records, outcomes: Sequence[TrialOutcome] | None = None) -> Decision | None:
    """The decision, or None while fewer than two ranks have ended with a result."""
    try:
        return decide_run(records, outcomes)
    except ResultsError:
        return None
