"""Adapter files and their comparison with a reference file, paired over the same examples.

The claim is "this file against that file". It holds no seed: the only noise is which examples were drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rightrank.decision.judge import CONFIDENCE
from rightrank.decision.metrics import default_margin
from rightrank.decision.table import Cell, ScoreTable, table_of
from rightrank.maths.intervals import Estimate, estimate
from rightrank.records import TrialFinished, TrialOutcome
from rightrank.records.adapter import AdapterAnswer, AdapterCandidate, AdapterOrigin


@dataclass(frozen=True, slots=True)
class Question:
    """What candidates are compared by."""

    metric: str
    higher_is_better: bool
    margin: float | None  # None: the metric's default
    token_loss: bool = True
    trusts_values: bool = False  # whether a difference without scores by example is taken as exact, as in a replay


@dataclass(frozen=True, slots=True)
class AdapterFile:
    trial: TrialFinished
    cell: Cell

    @property
    def how(self) -> AdapterOrigin:
        if self.trial.truncate_from is None:
            return "trained"
        return "recovered" if self.trial.steps > 0 else "truncated"

    @property
    def loss(self) -> float:
        return self.cell.loss


def margin_of(question: Question, reference: AdapterFile, table: ScoreTable) -> float:
    if question.margin is not None:
        return question.margin
    return default_margin(table.kind, reference.cell.value, table.values())


@dataclass(frozen=True, slots=True)
class Against:
    """Comparison with the reference file."""

    reference: AdapterFile
    table: ScoreTable
    margin: float
    trusts_values: bool

    def difference(self, cell: Cell, other: Cell | None = None) -> Estimate:
        """Paired over examples, metric's unit; above 0 is worse. A perplexity's is relative to the reference's."""
        against = other or self.reference.cell
        return estimate(np.stack([cell.sums - against.sums]), cell.weights)

    def judged(self, file: AdapterFile) -> AdapterCandidate:
        difference = 0.0
        low = high = 0.0 if file is self.reference else None  # 0 is exact
        if file.trial.trial_id != self.reference.trial.trial_id:
            found = self.difference(file.cell)
            difference = self._unit(found.mean)
            if file.cell.examples:
                high = self._unit(found.bound(CONFIDENCE))
                low = self._unit(-found.reversed().bound(CONFIDENCE))
        return AdapterCandidate(
            rank=file.trial.rank,
            how=file.how,
            trial_id=file.trial.trial_id,
            value=file.cell.value,
            difference=difference,
            difference_low=low,
            difference_high=high,
            holds=self._holds(difference, high),
        )

    def _holds(self, difference: float, high: float | None) -> bool:
        if high is None:
            return self.trusts_values and difference <= self.margin
        return high < self.margin

    def _unit(self, oriented: float) -> float:
        if self.table.kind != "perplexity":
            return oriented
        return self.reference.cell.value * math.expm1(min(oriented, 100.0))


def files_of(outcomes: Sequence[TrialOutcome], question: Question) -> tuple[dict[str, AdapterFile], ScoreTable]:
    """Finished whole trainings and truncations by trial id, with the cells of a table that holds them all."""
    trials = [
        outcome
        for outcome in outcomes
        if isinstance(outcome, TrialFinished)
        and outcome.rank > 0
        and outcome.stop_at is None
        and question.metric in outcome.metrics
    ]
    if not trials:
        return {}, ScoreTable(question.metric, question.higher_is_better, {})
    files: dict[str, AdapterFile] = {}
    lengths = {len(items[0]) if (items := trial.items(question.metric)) else 0 for trial in trials}
    table = ScoreTable(question.metric, question.higher_is_better, {})
    for trial in trials:
        bare = trial if len(lengths) == 1 else trial.model_copy(update={"item_losses": [], "item_tokens": []})
        table = table_of([bare], question.metric, question.higher_is_better)
        files[trial.trial_id] = AdapterFile(trial, next(iter(table.cells.values())))
    kind = "loss" if table.kind == "token_loss" and not question.token_loss else table.kind
    cells = {(index, 0.0, 0): file.cell for index, file in enumerate(files.values())}
    return files, ScoreTable(question.metric, question.higher_is_better, cells, {}, kind)


def compared_adapters(
    answer: AdapterAnswer, outcomes: Sequence[TrialOutcome], question: Question
) -> list[AdapterCandidate]:
    """Every adapter of a run against the reference of `answer`, by descending rank.

    Of several runs of a rank, the best is shown, and every one that the answer names: a guard may hand over another
    learning rate of the reference's rank. Where the journal lacks a run that the answer names, there are its candidates alone.
    """
    files, table = files_of(outcomes, question)
    named = {answer.trial_id, answer.reference_id, answer.trained_id}
    if not named <= files.keys():
        return answer.candidates
    against = Against(files[answer.reference_id], table, answer.margin, question.trusts_values)
    shown = [files[trial_id] for trial_id in sorted(named, key=lambda trial_id: files[trial_id].loss)]
    places = {(file.trial.rank, file.how) for file in shown}
    for file in sorted(files.values(), key=lambda file: file.loss):
        place = file.trial.rank, file.how
        if file.trial.truncate_from in (None, answer.trained_id) and place not in places:
            places.add(place)
            shown.append(file)
    return [against.judged(file) for file in sorted(shown, key=lambda file: (-file.trial.rank, file.how))]
