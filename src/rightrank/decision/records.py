"""The journal of a run as evidence: its records by kind, and the decision that they support."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rightrank.decision.adapter import Criterion, compared_adapters, making_of
from rightrank.decision.next_run import run_beyond_the_edge
from rightrank.decision.rule import ASKED_CONFIDENCE, decision_of
from rightrank.decision.table import ScoreTable, table_of, without_collapsing
from rightrank.schema.decision import AdapterCandidate, Decision, NextRun, TrainingRankEstimate
from rightrank.schema.errors import ResultsError, RunFolderError
from rightrank.schema.events import AdapterRecorded, JournalRecord, RunContinued, RunStarted, TestEvaluated
from rightrank.schema.metrics import REPORTED_ONLY, Checkpoint, unknown_direction
from rightrank.schema.settings import Goal, SelectSettings
from rightrank.schema.trials import (
    OUTCOMES,
    EvalPoint,
    Record,
    TrialFinished,
    TrialLook,
    TrialOutcome,
    TrialStarted,
    steps_of,
)

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(slots=True)
class Records:
    """What a journal says, by kind."""

    started: RunStarted
    outcomes: list[TrialOutcome] = field(default_factory=list)  # the last one of each trial
    tests: list[TestEvaluated] = field(default_factory=list)
    adapters: list[AdapterRecorded] = field(default_factory=list)  # answers to the first question, the last one valid
    looks: dict[str, list[EvalPoint]] = field(default_factory=dict)  # by trial: what custom trainers reported
    _places: dict[str, int] = field(default_factory=dict, repr=False, compare=False)  # in `outcomes`, by trial

    @classmethod
    def of(cls, started: RunStarted, records: Iterable[JournalRecord]) -> Records:
        kept = cls(started)
        for record in records:
            kept.keep(record)
        return kept

    def keep(self, record: JournalRecord) -> None:
        """Add the next record of the journal.

        The looks of a trial that starts again are dropped. A step that is reported again replaces the earlier report and all later ones.
        """
        match record:
            case TestEvaluated():
                self.tests.append(record)
            case AdapterRecorded():
                self.adapters.append(record)
            case TrialStarted():
                self.looks.pop(record.trial_id, None)
            case TrialLook():
                before = [point for point in self.looks.get(record.trial_id, []) if point.step < record.step]
                self.looks[record.trial_id] = [*before, record.point]
            case _ if isinstance(record, OUTCOMES):
                place = self._places.setdefault(record.trial_id, len(self.outcomes))
                self.outcomes[place : place + 1] = [record]

    @property
    def settings(self) -> SelectSettings:
        return self.started.select_settings

    def copy(self) -> Records:
        """The same records, for a reader whose own changes are nobody else's."""
        outcomes, tests, adapters = [*self.outcomes], [*self.tests], [*self.adapters]
        return Records(self.started, outcomes, tests, adapters, {**self.looks}, {**self._places})

    def finished(self) -> list[TrialFinished]:
        return [outcome for outcome in self.outcomes if isinstance(outcome, TrialFinished)]

    @property
    def by_id(self) -> dict[str, TrialFinished]:
        """The finished trials by id."""
        return {trial.trial_id: trial for trial in self.finished()}


def records_of(journal: Sequence[JournalRecord], where: str) -> Records:
    """The records of a journal. `where` names it in error messages.

    Raises:
        RunFolderError: the journal is empty, or does not begin with the start of a run.
    """
    if not journal or not isinstance(journal[0], RunStarted):
        raise RunFolderError(f"{where}: no run has started here; give a folder that `rightrank select --out` made")
    return Records.of(settled_start(journal), journal)


def settled_start(journal: Sequence[JournalRecord]) -> RunStarted:
    """The start of the run, with the settings that it was last continued with."""
    started = journal[0]
    assert isinstance(started, RunStarted)
    continued = [record for record in journal if isinstance(record, RunContinued)]
    changed = {name: value for further in continued for name, value in further.settings.items()}
    update: dict[str, object] = {"settings": started.settings | changed} if changed else {}
    for further in continued:
        if further.evaluation_items is not None:
            update |= {"evaluation_items": further.evaluation_items, "data": further.data or started.data}
    return started.model_copy(update=update) if update else started


def decide_run(records: Records) -> Decision:
    """The decision at the margin and by the metric of the run.

    Raises:
        ResultsError: fewer than two ranks have a finished trial.
    """
    return decide_on(records, comparable(records), records.started.metric, records.settings.margin)


def decide_on(
    records: Records,
    outcomes: Sequence[TrialOutcome],
    metric: str,
    margin: float | None = None,
    *,
    higher: bool | None = None,
    confidence: float | None = None,
    checkpoint: Checkpoint | None = None,
) -> Decision:
    """The decision by one of the run's metrics, with the answers by the others; at the run's checkpoint unless one is given.

    Raises:
        ResultsError: fewer than two ranks have the metric, or its direction is not known.
    """
    started, settings = records.started, records.settings
    asked = [started.metric, *settings.metrics]
    known = metrics_of(records) if started.data.form != "own" else ()
    beside = [name for name in known if name != metric and (name in asked or name not in REPORTED_ONLY)]
    others = [run_table(records, outcomes, name) for name in beside if metric_direction(started, name) is not None]
    wanted = settings.confidence if confidence is None else confidence
    return decision_of(
        run_table(records, outcomes, metric, higher),
        margin,
        checkpoint=checkpoint or settings.checkpoint,
        others=others,
        smallest_if_alike=started.is_rl,
        confidence=None if wanted is None and started.is_rl else wanted or ASKED_CONFIDENCE,
    )


def metrics_of(records: Records) -> list[str]:
    """The metrics of the run's trials; the metric that decides comes first."""
    names = dict.fromkeys(name for trial in records.finished() for name in trial.metrics)
    return list(dict.fromkeys([records.started.metric, *names]))


def run_table(
    records: Records,
    outcomes: Sequence[TrialOutcome] | None = None,
    metric: str | None = None,
    higher: bool | None = None,
) -> ScoreTable:
    """The scores of a run by `metric`, which defaults to the metric that decides; `higher`: whether higher is better, if given.

    Raises:
        ResultsError: neither the caller, nor the run, nor the metric's name has the direction.
    """
    started = records.started
    outcomes = comparable(records) if outcomes is None else outcomes
    if started.data.form == "own":  # the example scores of a custom trainer are those of the metric that decides
        return table_of(outcomes, started.metric, started.higher_is_better if higher is None else higher)
    metric = metric or started.metric
    if higher is None:
        higher = metric_direction(started, metric)
    if higher is None:
        raise ResultsError(f"{unknown_direction(metric)}; give --higher-is-better or --lower-is-better")
    along = started.points_metric or started.metric
    return table_of(outcomes, metric, higher, along, looks=records.outcomes, loss=started.data.loss_kind)


def metric_direction(started: RunStarted, metric: str) -> bool | None:
    """Whether higher is better by a metric of the run: from its settings, else from the metric's name; None: not known."""
    if metric == started.metric:
        return started.higher_is_better
    return started.select_settings.direction_of(metric)


def comparable(records: Records) -> list[TrialOutcome]:
    """The outcomes that may be compared: whole trainings."""
    return without_collapsing([outcome for outcome in records.outcomes if outcome.is_direct])


def best_trial(records: Records, decision: Decision, rank: int) -> TrialFinished:
    """The seed of a rank with the best held-out value, at the rank's best learning rate."""
    evidence = next(evidence for evidence in decision.ranks if evidence.rank == rank)
    trials = [trial for trial in records.finished() if trial.trial_id in evidence.trial_ids]
    sign = -1 if decision.higher_is_better else 1
    return min(trials, key=lambda trial: (sign * trial.value, trial.seed))


def decision_so_far(records: Records) -> Decision | None:
    """The decision, or None while fewer than two ranks have a result."""
    try:
        return decide_run(records)
    except ResultsError:
        return None


def criterion_of(records: Records) -> Criterion:
    """The metric and the margin of the run."""
    started = records.started
    return Criterion(
        started.metric,
        started.higher_is_better,
        records.settings.margin,
        started.data.loss_kind,
        points_are_of_the_metric=(started.points_metric or started.metric) == started.metric,
    )


def compared(records: Records) -> list[AdapterCandidate]:
    """Every adapter of the run against the reference of its answer; empty before the first answer."""
    if not records.adapters:
        return []
    return compared_adapters(records.adapters[-1].answer, records.outcomes, criterion_of(records))


def trainings(records: Records) -> float:
    """Optimizer steps of all outcomes over those of a whole training; an arm that resumes pays for the rest."""
    by_id = records.by_id
    finished = [trial for trial in by_id.values() if trial.rank > 0]
    whole = max([0, *(trial.steps for trial in finished if trial.truncate_from is None)])
    steps = sum(steps_of(trial, by_id) for trial in finished)
    return round(steps / whole, 3) if whole else float(len(finished))


@dataclass(frozen=True, slots=True)
class Answers:
    """Both answers. One that was not asked, or is not known yet, is None."""

    decision: Decision | None  # of the training rank
    goal: Goal = "training-rank"
    adapter: AdapterRecorded | None = None
    making: str | None = None  # of the adapter, in a sentence
    trainings: float = 0.0  # so far
    estimate: TrainingRankEstimate | None = None  # of the training rank, where it was not asked
    started: RunStarted | None = None  # None: the results come from no run
    # beyond the learning rate of the adapter, where that is the lowest or the highest tried
    adapter_run: NextRun | None = None

    @property
    def next_runs(self) -> list[NextRun]:
        """Return the next runs of both answers, those of the decision first."""
        runs = [] if self.decision is None else self.decision.next_runs
        planned = {rate for run in runs if run.action == "rates" for rate in run.learning_rates}
        is_new = self.adapter_run is not None and not planned.issuperset(self.adapter_run.learning_rates)
        return [*runs, self.adapter_run] if self.adapter_run is not None and is_new else runs

    @property
    def cost(self) -> dict[str, float | None]:
        first = None if self.adapter is None else self.adapter.trainings
        return {"trainings": self.trainings, "trainings_to_adapter": first}

    def document(self) -> dict[str, Any]:
        """The object of `decision.json`, and of `select --json`."""
        started, adapter = self.started, self.adapter
        fields: dict[str, Any] = dict.fromkeys(("rank", "verdict", "confidence", "sentence"))
        fields |= _fields(self.decision) or {}
        of_run = {} if started is None else started.model_dump(include={"metric", "higher_is_better"})
        return (
            {**of_run, "goal": self.goal}
            | fields
            | {
                "adapter_sentence": adapter and adapter.answer.sentence,
                "cost": self.cost,
                "adapter_making": self.making,
                "adapter_flags": [] if self.adapter_run is None else ["lr_edge"],
                "handed_over": _fields(adapter and adapter.handed_over),
                "adapter_answer": _fields(adapter and adapter.answer),
                "training_rank_estimate": _fields(self.estimate),
            }
        )


def answers_of(
    records: Records,
    decision: Decision | None,
    goal: Goal = "training-rank",
    estimate: TrainingRankEstimate | None = None,
) -> Answers:
    adapter = records.adapters[-1] if records.adapters else None
    chosen = records.by_id.get(adapter.answer.trial_id) if adapter else None
    making = None if chosen is None else making_of(chosen, records.finished())
    sentence = run = None
    if making is not None:
        sentence, rank = making.sentence(), making.trained_rank
        run = run_beyond_the_edge(run_table(records), rank, making.learning_rate, [rank])
    return Answers(decision, goal, adapter, sentence, trainings(records), estimate, records.started, run)


def _fields(record: Record | None) -> Any:
    return record and record.model_dump()


_OF_TRIAL = (
    "train_value", "trainable_parameters", "train_seconds", "train_tokens", "eval_seconds", "peak_bytes", "reason",
)  # fmt: skip


def trials_frame(records: Records, examples: bool) -> DataFrame:
    """A row for each trial with its metrics, or for each held-out example of each finished one with its scores."""
    from pandas import DataFrame, concat

    if not examples:
        return DataFrame(map(_trial_row, records.outcomes))
    started = records.started  # the scores of a custom trainer are of the metric that decides
    columns = [
        _example_columns(trial, (started.metric,) if started.is_own else trial.metrics) for trial in records.finished()
    ]
    parts = [DataFrame(of_trial) for of_trial in columns if of_trial]
    return concat(parts, ignore_index=True) if parts else DataFrame()


def _identity(trial: TrialOutcome) -> dict[str, Any]:
    stage = "base" if trial.rank == 0 else trial.arm.stage() or "whole"
    arm = {name: getattr(trial, name) for name in ("rank", "learning_rate", "lora_alpha", "seed", "steps")}
    return {"trial_id": trial.trial_id, "stage": stage, **arm}


def _trial_row(trial: TrialOutcome) -> dict[str, Any]:
    measured = dict(trial.metrics) if isinstance(trial, TrialFinished) else {}
    known = {name: getattr(trial, name) for name in _OF_TRIAL if hasattr(trial, name)}
    return {**_identity(trial), "status": trial.type.removeprefix("trial_"), **measured, **known}


def _example_columns(trial: TrialFinished, metrics: Iterable[str]) -> dict[str, Any]:
    """Columns of one length: the score of each metric, a loss by token, and its weight; empty without scores by example."""
    scores = {metric: items for metric in metrics if (items := trial.items(metric)) is not None}
    if not scores:
        return {}
    columns: dict[str, Any] = {"item": range(len(next(iter(scores.values()))[0]))}
    for metric, (sums, weights) in scores.items():
        columns[metric] = [total / weight if weight else None for total, weight in zip(sums, weights, strict=True)]
    if trial.item_groups is not None:
        columns["group"] = trial.item_groups
    return {**_identity(trial), **columns, "tokens": next(iter(scores.values()))[1]}
