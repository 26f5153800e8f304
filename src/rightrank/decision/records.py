"""Read the journal of a run as evidence: its records by kind, and the decision that they support."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rightrank.decision.adapter import build_provenance, compare_adapters
from rightrank.decision.adapter_comparison import Criterion
from rightrank.decision.learning_rate import describe_learning_rate
from rightrank.decision.next_run import plan_rate_run
from rightrank.decision.ranks import DEFAULT_CONFIDENCE
from rightrank.decision.rule import decide_table
from rightrank.decision.table import ScoreTable, build_table
from rightrank.schema.decision import AdapterAnswer, AdapterCandidate, Decision, LearningRateAnswer, NextRun
from rightrank.schema.errors import ResultsError, RunFolderError
from rightrank.schema.events import AdapterRecorded, JournalRecord, RunContinued, RunStarted, TestEvaluated
from rightrank.schema.metrics import Checkpoint, Margin, format_unknown_direction
from rightrank.schema.settings import Goal, SelectSettings
from rightrank.schema.trials import (
    OUTCOMES,
    EvalPoint,
    Record,
    TrialEvaluated,
    TrialFinished,
    TrialOutcome,
    TrialStarted,
    count_added_steps,
)


@dataclass(slots=True)
class Records:
    """The records of a journal by kind."""

    started: RunStarted
    outcomes: list[TrialOutcome] = field(default_factory=list)  # the last outcome of each trial
    tests: list[TestEvaluated] = field(default_factory=list)
    adapters: list[AdapterRecorded] = field(
        default_factory=list
    )  # answers on the deployment rank; the last one is valid
    evaluations: dict[str, list[EvalPoint]] = field(default_factory=dict)  # reports of custom trainers by trial
    _indices: dict[str, int] = field(default_factory=dict, repr=False, compare=False)  # index in `outcomes` by trial

    @classmethod
    def from_journal(cls, started: RunStarted, records: Iterable[JournalRecord]) -> Records:
        instance = cls(started)
        for record in records:
            instance.add(record)
        return instance

    def add(self, record: JournalRecord) -> None:
        """Add the next record of the journal.

        If a trial starts again, its earlier evaluations are dropped. A step that is reported again replaces the earlier report and all
        later ones.
        """
        match record:
            case TestEvaluated():
                self.tests.append(record)
            case AdapterRecorded():
                self.adapters.append(record)
            case TrialStarted():
                self.evaluations.pop(record.trial_id, None)
            case TrialEvaluated():
                earlier_points = [
                    point for point in self.evaluations.get(record.trial_id, []) if point.step < record.step
                ]
                self.evaluations[record.trial_id] = [*earlier_points, record.point]
            case _ if isinstance(record, OUTCOMES):
                index = self._indices.setdefault(record.trial_id, len(self.outcomes))
                self.outcomes[index : index + 1] = [record]

    @property
    def settings(self) -> SelectSettings:
        return self.started.select_settings

    def copy(self) -> Records:
        """Return a copy that can be changed independently."""
        outcomes, tests, adapters = [*self.outcomes], [*self.tests], [*self.adapters]
        return Records(self.started, outcomes, tests, adapters, {**self.evaluations}, {**self._indices})

    def list_finished(self) -> list[TrialFinished]:
        return [outcome for outcome in self.outcomes if isinstance(outcome, TrialFinished)]

    @property
    def by_id(self) -> dict[str, TrialFinished]:
        """Return the finished trials by id."""
        return {trial.trial_id: trial for trial in self.list_finished()}


def read_records(journal: Sequence[JournalRecord], source: str) -> Records:
    """Return the records of a journal. `source` names it in error messages.

    Raises:
        RunFolderError: the journal is empty, or does not begin with the start of a run.
    """
    if not journal or not isinstance(journal[0], RunStarted):
        raise RunFolderError(
            f"{source}: no run has started here; give the run folder of `rightrank select`, such as data-model"
        )
    return Records.from_journal(get_effective_start(journal), journal)


def get_effective_start(journal: Sequence[JournalRecord]) -> RunStarted:
    """Return the start of the run with the settings of its last continuation."""
    started = journal[0]
    assert isinstance(started, RunStarted)
    continuations = [record for record in journal if isinstance(record, RunContinued)]
    changed_settings = {name: value for continuation in continuations for name, value in continuation.settings.items()}
    return started.model_copy(update={"settings": started.settings | changed_settings}) if changed_settings else started


def decide_run(records: Records) -> Decision:
    """Decide at the margin and by the metric of the run.

    Raises:
        ResultsError: fewer than two ranks have a finished trial.
    """
    return decide_by_metric(records, list_comparable_outcomes(records), records.started.metric, records.settings.margin)


def decide_by_metric(
    records: Records,
    outcomes: Sequence[TrialOutcome],
    metric: str,
    margin: Margin | None = None,
    *,
    higher: bool | None = None,
    confidence: float | None = None,
    checkpoint: Checkpoint | None = None,
) -> Decision:
    """Decide by one of the run's metrics, at the run's checkpoint unless one is given.

    Raises:
        ResultsError: fewer than two ranks have the metric, or its direction is not known.
    """
    settings = records.settings
    return decide_table(
        build_run_table(records, outcomes, metric, higher),
        margin,
        checkpoint=checkpoint or settings.checkpoint,
        confidence=confidence or DEFAULT_CONFIDENCE,
    )


def list_metrics(records: Records) -> list[str]:
    """List the metrics of the run's trials; the deciding metric comes first."""
    names = dict.fromkeys(name for trial in records.list_finished() for name in trial.metrics)
    return list(dict.fromkeys([records.started.metric, *names]))


def build_run_table(
    records: Records,
    outcomes: Sequence[TrialOutcome] | None = None,
    metric: str | None = None,
    higher: bool | None = None,
) -> ScoreTable:
    """Build the table of a run's scores by `metric`, by default the deciding one.

    `higher` says whether higher is better, if given.

    Raises:
        ResultsError: neither the caller, nor the run, nor the metric's name has the direction.
    """
    started = records.started
    outcomes = list_comparable_outcomes(records) if outcomes is None else outcomes
    if started.data.form == "custom":  # The example scores of a custom trainer belong to the deciding metric.
        return build_table(outcomes, started.metric, started.higher_is_better if higher is None else higher)
    metric = metric or started.metric
    if higher is None:
        higher = get_metric_direction(started, metric)
    if higher is None:
        raise ResultsError(f"{format_unknown_direction(metric)}; give --higher-is-better or --lower-is-better")
    evaluation_metric = started.points_metric or started.metric
    return build_table(
        outcomes, metric, higher, evaluation_metric, partial_outcomes=records.outcomes, loss=started.data.loss_kind
    )


def list_tried_rates(records: Records) -> set[float]:
    """List the learning rates of all trainings, including those that the search added to the settings."""
    return {outcome.learning_rate for outcome in records.outcomes if outcome.rank > 0 and outcome.learning_rate > 0}


def get_metric_direction(started: RunStarted, metric: str) -> bool | None:
    """Return whether higher is better by a metric of the run, from its settings or else its name; None: not known."""
    if metric == started.metric:
        return started.higher_is_better
    return started.select_settings.get_direction(metric)


def list_comparable_outcomes(records: Records) -> list[TrialOutcome]:
    """List the outcomes that may be compared: complete trainings, and the base with their trained heads if there are any."""
    zero = [outcome for outcome in records.outcomes if outcome.rank == 0 and outcome.truncate_from is not None][-1:]
    direct = [outcome for outcome in records.outcomes if outcome.is_direct and (outcome.rank > 0 or not zero)]
    return exclude_longer_trainings([*zero, *direct])


Outcome = TypeVar("Outcome", bound=TrialOutcome)


def exclude_longer_trainings(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Keep the shortest training of each rank, learning rate and seed.

    The training of twice the steps, which goal "best-adapter" makes, is compared with the others as an adapter only.
    """
    # Truncations have no steps, and are compared with each other alone.
    keys = [(outcome.rank, outcome.learning_rate, outcome.seed, outcome.truncate_from is None) for outcome in outcomes]
    fewest: dict[tuple[int, float, int, bool], int] = {}
    for key, outcome in zip(keys, outcomes, strict=True):
        fewest[key] = min(outcome.steps, fewest.get(key, outcome.steps))
    return [outcome for key, outcome in zip(keys, outcomes, strict=True) if outcome.steps == fewest[key]]


def find_best_trial(records: Records, decision: Decision, rank: int) -> TrialFinished:
    """Find the trial with the best held-out value over seeds, at the rank's best learning rate."""
    evidence = next(evidence for evidence in decision.ranks if evidence.rank == rank)
    trials = [trial for trial in records.list_finished() if trial.trial_id in evidence.trial_ids]
    sign = -1 if decision.higher_is_better else 1
    return min(trials, key=lambda trial: (sign * trial.value, trial.seed))


def add_base_note(decision: Decision, records: Records) -> Decision:
    """Say in the decision of a custom trainer's run that the base was not measured."""
    if not records.started.is_custom_trainer or any(trial.rank == 0 for trial in records.list_finished()):
        return decision
    failed = next((trial for trial in records.outcomes if trial.rank == 0), None)
    reason = "add 0 to the ranks" if failed is None or isinstance(failed, TrialFinished) else failed.reason
    return decision.model_copy(
        update={"sentence": f"{decision.sentence} The base was not measured, so no gain over it is shown ({reason})."}
    )


def decide_if_possible(records: Records) -> Decision | None:
    """Decide, or return None while fewer than two ranks have a result."""
    try:
        return decide_run(records)
    except ResultsError:
        return None


def build_criterion(records: Records) -> Criterion:
    """Return the metric and the margin of the run."""
    started = records.started
    return Criterion(
        started.metric,
        started.higher_is_better,
        records.settings.margin,
        started.data.loss_kind,
        points_use_metric=(started.points_metric or started.metric) == started.metric,
    )


def compare_run_adapters(records: Records) -> list[AdapterCandidate]:
    """Compare every adapter of the run with the reference of its answer; empty before the first answer."""
    if not records.adapters:
        return []
    return compare_adapters(records.adapters[-1].answer, records.outcomes, build_criterion(records))


def count_trainings(records: Records) -> float:
    """Return the optimizer steps of all outcomes divided by those of a complete training.

    An arm that resumes another one counts only its added steps.
    """
    by_id = records.by_id
    finished = [trial for trial in by_id.values() if trial.rank > 0]
    trainings = exclude_longer_trainings([trial for trial in finished if trial.truncate_from is None])
    steps_per_training = max([0, *(trial.steps for trial in trainings)])
    steps = sum(count_added_steps(trial, by_id) for trial in finished)
    return round(steps / steps_per_training, 3) if steps_per_training else float(len(finished))


@dataclass(frozen=True, slots=True)
class Answers:
    """The deployment rank and the training rank. An answer that was not requested, or is not known yet, is None."""

    decision: Decision | None  # of the training rank
    goal: Goal = "training-rank"
    adapter: AdapterRecorded | None = None
    provenance: str | None = None  # how the adapter was made, as a sentence
    adapter_rate: float = 0.0  # the learning rate of the adapter's training; 0: unknown
    adapter_steps: int = 0  # its optimizer steps; 0: unknown
    trainings: float = 0.0  # so far
    started: RunStarted | None = None  # None: the results are not from a run
    # at a learning rate beyond the adapter's, if that is the lowest or the highest one tried
    adapter_run: NextRun | None = None
    learning_rate: LearningRateAnswer | None = None  # of the adapter; None if only one was tried

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

    def build_document(self) -> dict[str, Any]:
        """Return the object of `decision.json` and of `select --json`."""
        started, adapter = self.started, self.adapter
        fields: dict[str, Any] = dict.fromkeys(("rank", "verdict", "confidence", "sentence"))
        fields |= _dump_record(self.decision) or {}
        of_run = {} if started is None else started.model_dump(include={"metric", "higher_is_better"})
        return (
            {**of_run, "goal": self.goal}
            | fields
            | {
                "adapter_sentence": adapter and adapter.answer.sentence,
                **_dump_shares(None if adapter is None else adapter.answer),
                "cost": self.cost,
                "adapter_provenance": self.provenance,
                "adapter_flags": ["lr_edge"] * (self.adapter_run is not None)
                + ["no_gain"] * (adapter is not None and adapter.answer.has_no_gain),
                "handed_over": _dump_record(adapter and adapter.handed_over),
                "learning_rate": self.adapter_rate or fields.get("learning_rate"),
                "learning_rates": [candidate.model_dump() for candidate in self.learning_rate.candidates]
                if self.learning_rate
                else [],
                "learning_rate_sentence": self.learning_rate and self.learning_rate.sentence,
                "adapter_answer": _dump_record(adapter and adapter.answer),
            }
        )


def build_answers(
    records: Records,
    decision: Decision | None,
    goal: Goal = "training-rank",
) -> Answers:
    adapter = records.adapters[-1] if records.adapters else None
    chosen = records.by_id.get(adapter.answer.trial_id) if adapter else None
    provenance = None if chosen is None else build_provenance(chosen, records.list_finished())
    sentence = run = None
    adapter_rate, adapter_steps = 0.0, 0
    if provenance is not None:
        adapter_rate, adapter_steps = provenance.learning_rate, provenance.steps
        sentence, rank = provenance.format_sentence(), provenance.trained_rank
        run = plan_rate_run(build_run_table(records), rank, provenance.learning_rate, [rank])
    trained = chosen and records.by_id.get(chosen.truncate_from or chosen.trial_id)
    rate = None if trained is None else describe_learning_rate(trained, records.outcomes, build_criterion(records))
    return Answers(
        decision,
        goal,
        adapter,
        sentence,
        adapter_rate,
        adapter_steps,
        count_trainings(records),
        records.started,
        run,
        rate,
    )


def _dump_shares(answer: AdapterAnswer | None) -> dict[str, Any]:
    """Return what the adapter keeps of the gain."""
    if answer is None:
        return dict.fromkeys(("gain", "share_kept", "share_kept_low"))
    return answer.model_dump(include={"gain", "share_kept", "share_kept_low"})


def _dump_record(record: Record | None) -> Any:
    return record and record.model_dump()
