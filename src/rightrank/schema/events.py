"""The records of a run's journal, the commands that continue the run, and the events that a running selection sends to listeners."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import Field, JsonValue, TypeAdapter

from rightrank.schema.errors import RunFolderError
from rightrank.schema.metrics import LossKind, Margin
from rightrank.schema.results import AdapterAnswer, Decision, ExportedAdapter, NextRun, SplitSummary
from rightrank.schema.setting_table import build_options
from rightrank.schema.settings import MAX_SEED, SelectSettings, build_budget_options, build_reproduce_command
from rightrank.schema.trials import (
    OUTCOMES,
    SCHEMA_VERSION,
    BoundedInt,
    EvalPoint,
    ExampleScores,
    JournalLine,
    Record,
    RedactedText,
    TrialDiverged,
    TrialEvaluated,
    TrialFailed,
    TrialFinished,
    TrialOutcome,
    TrialStarted,
    count_added_steps,
    exclude_longer_trainings,
    hash_content,
)
from rightrank.version import __version__

# The origin of a run's trainings: the built-in trainer, or a function that trains.
RunKind: TypeAlias = Literal["selection", "custom_trainer"]


class DataSummary(Record):
    """A summary of the data and how it was read."""

    # `custom`: a custom trainer reads the data. `ranking`: rows of a trainer of rerankers or embedding models.
    form: Literal["text", "prompt_completion", "messages", "classification", "preference", "ranking", "custom"]
    splits: dict[str, SplitSummary]
    splits_given: bool
    duplicates_across_splits: BoundedInt
    near_duplicates_across_splits: BoundedInt = (
        0  # evaluated rows that differ from a training example only in white space or case
    )
    classes: list[str] | None = None  # in the order of the logits
    unreadable: BoundedInt = 0  # rows skipped because of lone surrogates, which no tokenizer accepts
    rows: BoundedInt = 0  # rows that were read
    repeated: BoundedInt = 0  # held-out rows skipped because another row is equal
    not_evaluated: BoundedInt = 0  # held-out rows beyond the number that is evaluated
    shape: str | None = None  # how rows of another shape were converted to the form, for the user
    unused_columns: list[str] = Field(default_factory=list)  # of the first row
    equal_pairs: BoundedInt = 0  # rows skipped because `chosen` and `rejected` are the same

    # The column that defines groups of held-out rows, or `prompt`; None: rows are treated as independent.
    grouped_by: str | None = None
    groups: BoundedInt = 0  # in the validation split; 0: no groups
    groups_across_splits: BoundedInt = 0  # held-out groups with rows in the train split too

    @property
    def loss_kind(self) -> LossKind:
        """Return the kind of loss: per token, per example or per pair."""
        kinds: dict[str, LossKind] = {"preference": "pair_loss", "classification": "loss", "ranking": "loss"}
        return kinds.get(self.form, "token_loss")


class RunStarted(Record):
    """The first line of a journal: everything that the trials share."""

    @classmethod
    def build(
        cls, kind: RunKind, settings: Mapping[str, Any], identity: dict[str, Any] | None = None, **fields: Any
    ) -> RunStarted:
        """Return the record of a run that begins now.

        Args:
            identity: the values (JSON) that the trials depend on; None for a run without trials of its own.
            fields: all other fields.
        """
        fingerprint = "" if identity is None else hash_content(identity)
        stated = {"rightrank_version": __version__, "started_at": datetime.now(UTC).isoformat(timespec="seconds")}
        return cls(kind=kind, settings=dict(settings), fingerprint=fingerprint, **stated | fields)

    def get_metric_direction(self, metric: str) -> bool | None:
        """Return whether higher is better by a metric of the run, from its settings or else its name; None: not known."""
        return self.higher_is_better if metric == self.metric else self.select_settings.get_direction(metric)

    @property
    def is_custom_trainer(self) -> bool:
        """Return whether another trainer provides the model and the data."""
        return self.kind != "selection"

    @property
    def select_settings(self) -> SelectSettings:
        """Return the settings. Those that a custom trainer does not record have their defaults."""
        return SelectSettings.from_stored(self.settings)

    @property
    def model_name(self) -> str | None:
        """Return the name of the model, or None if a custom trainer provides it."""
        return cast("str | None", self.settings.get("model"))

    @property
    def data_name(self) -> str | None:
        return cast("str | None", self.settings.get("data"))

    type: Literal["run_started"] = "run_started"  # these are the first bytes of a journal
    schema_version: BoundedInt = SCHEMA_VERSION
    kind: RunKind = "selection"
    rightrank_version: str
    fingerprint: str
    settings: dict[str, JsonValue]
    environment: dict[str, str]
    data: DataSummary
    evaluation_examples: list[str]  # content hashes, in the order of all lists of examples
    metric: str
    higher_is_better: bool
    points_metric: str | None = None  # the metric of evaluations during training, if it is not the deciding one
    started_at: str


class TestEvaluated(ExampleScores, JournalLine):
    """The value of a finished trial on the test split, which the selection never uses."""

    __test__ = False  # the class is not a pytest test

    type: Literal["test_evaluated"] = "test_evaluated"
    trial_id: str
    rank: BoundedInt
    value: float
    metrics: dict[str, float] = Field(default_factory=dict)  # all metrics measured on the test split
    metric: str | None = None  # the metric of `value`, if it is not the deciding one: a task has no test split


class RunContinued(JournalLine):
    """A continuation of the run with other values of settings that change no trial. They apply from here on."""

    type: Literal["run_continued"] = "run_continued"
    settings: dict[str, JsonValue]


class AdapterRecorded(JournalLine):
    """The deployment rank and the adapter in `adapter/`, valid until the next such record."""

    type: Literal["adapter_recorded"] = "adapter_recorded"
    answer: AdapterAnswer
    handed_over: ExportedAdapter
    trainings: float  # cost up to the answer, in complete trainings


class DecisionRecorded(JournalLine):
    """A decision, and the trial whose adapter is the result."""

    type: Literal["decided"] = "decided"
    decision: Decision
    adapter_trial_id: str | None


AnyJournalRecord: TypeAlias = (
    RunStarted
    | TrialStarted
    | TrialEvaluated
    | TrialFinished
    | TrialDiverged
    | TrialFailed
    | TestEvaluated
    | RunContinued
    | AdapterRecorded
    | DecisionRecorded
)
JournalRecord: TypeAlias = Annotated[AnyJournalRecord, Field(discriminator="type")]


JOURNAL_RECORD_ADAPTER: TypeAdapter[JournalRecord] = TypeAdapter(JournalRecord)


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

    def list_finished(self) -> list[TrialFinished]:
        return [outcome for outcome in self.outcomes if isinstance(outcome, TrialFinished)]

    @property
    def by_id(self) -> dict[str, TrialFinished]:
        """Return the finished trials by id."""
        return {trial.trial_id: trial for trial in self.list_finished()}

    def list_metrics(self) -> list[str]:
        """List the metrics of the trials; the deciding metric comes first."""
        names = dict.fromkeys(name for trial in self.list_finished() for name in trial.metrics)
        return list(dict.fromkeys([self.started.metric, *names]))

    def list_tried_rates(self) -> set[float]:
        """List the learning rates of all trainings, including those that the search added to the settings."""
        return {outcome.learning_rate for outcome in self.outcomes if outcome.rank > 0 and outcome.learning_rate > 0}

    def count_trainings(self) -> float:
        """Return the optimizer steps of all outcomes divided by those of a complete training.

        An arm that resumes another one counts only its added steps.
        """
        by_id = self.by_id
        finished = [trial for trial in by_id.values() if trial.rank > 0]
        trainings = exclude_longer_trainings([trial for trial in finished if trial.truncate_from is None])
        steps_per_training = max([0, *(trial.steps for trial in trainings)])
        steps = sum(count_added_steps(trial, by_id) for trial in finished)
        return round(steps / steps_per_training, 3) if steps_per_training else float(len(finished))


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


def build_next_commands(
    started: RunStarted,
    runs: Sequence[NextRun],
    run: str,
    margin: Margin | None = None,
    tried_rates: Collection[float] = (),
) -> list[str | None]:
    """Return the command of each next run, or None if options of `select` can't express it.

    A command that adds learning rates has all of `tried_rates`, so that the new ones are compared with those that the search added. A
    `margin` other than the run's own is added to the command, so that the continued run answers at this margin.
    """
    if started.is_custom_trainer:
        return [None] * len(runs)
    commands: list[str | None] = []
    for next_run in runs:
        changes = _collect_changes(started, next_run, tried_rates)
        if changes and margin is not None:
            changes["margin"] = margin
        if "max_eval_examples" in changes:  # these belong to the identity of a run, so this is another one
            settings = started.select_settings.model_copy(update=changes)
            commands.append(
                build_reproduce_command(started.model_name, started.data_name, settings, f"{run}-more-examples")
            )
            continue
        budget = build_budget_options(started.select_settings, next_run.trials)
        command = shlex.join(["rightrank", "select", "--out", run, *build_options(SelectSettings, changes), *budget])
        commands.append(command if changes else None)
    return commands


def _collect_changes(started: RunStarted, next_run: NextRun, tried_rates: Collection[float]) -> dict[str, Any]:
    """Collect the settings that a next run changes; empty if settings of `select` can't express it."""
    settings, added = started.select_settings, dict[str, Collection[float]]()
    if next_run.action == "seeds" and next_run.seeds is not None:
        unused_seeds = (seed for seed in range(MAX_SEED) if seed not in settings.seeds)
        added["seeds"] = list(islice(unused_seeds, max(0, next_run.seeds - len(settings.seeds))))
    if next_run.action == "rank":
        added["ranks"] = next_run.ranks
    given_rates = {*(settings.learning_rates or tried_rates)}
    if next_run.action in ("rank", "rates") and not {*next_run.learning_rates} <= given_rates:
        added["learning_rates"] = [*tried_rates, *next_run.learning_rates]
    changes: dict[str, Any] = {
        name: tuple(sorted({*(getattr(settings, name) or ()), *values}))
        for name, values in added.items()
        if not {*values} <= {*(getattr(settings, name) or ())}
    }
    examples = len(started.evaluation_examples)
    held_out = examples + started.data.not_evaluated  # the maximum number of examples that can be evaluated
    is_grouped = started.data.groups > 0  # More rows are not necessarily more groups.
    if next_run.examples is not None and not is_grouped and examples < next_run.examples <= held_out:
        changes["max_eval_examples"] = next_run.examples
    return changes


class SelectionPlanned(Record):
    """The maximum and the expected number of trainings; sent once, before the first trial."""

    started: RunStarted
    expected_trials: BoundedInt
    steps: BoundedInt  # optimizer steps of a complete training; 0: a custom trainer decides
    expected_trainings: float  # complete trainings
    trainings_at_most: float
    outcomes: list[TrialOutcome] = Field(default_factory=list)  # outcomes of earlier processes


class RunStopped(Record):
    """The end of a selection without an answer. The journal holds the finished trials."""

    reason: RedactedText


class Notice(Record):
    """A message for the user."""

    type: Literal["notice"] = "notice"
    text: RedactedText


class StepDone(Record):
    """Progress of a running trial."""

    type: Literal["step_done"] = "step_done"
    trial_id: str
    step: BoundedInt
    steps: BoundedInt
    loss: float
    seconds: float  # since the trial started


class EvaluationProgress(Record):
    """Progress of work outside of trainings: computing the frozen layers before the first training, or an evaluation by `compare`."""

    type: Literal["evaluating"] = "evaluating"
    label: str  # of the work, such as "rank 4"
    examples: BoundedInt
    total_examples: BoundedInt
    seconds: float  # since the work began


Event: TypeAlias = AnyJournalRecord | SelectionPlanned | RunStopped | Notice | StepDone | EvaluationProgress


class Listener:
    """A base class that receives the events of running trials and may ask them to stop. Its methods do nothing."""

    def on_event(self, event: Event) -> None:
        """Handle an event. It runs on the thread of the selection, so a slow listener slows the selection down."""

    def send_notice(self, text: str) -> None:
        """Send a message for the user as an event."""
        self.on_event(Notice(text=text))

    def should_stop(self) -> bool:
        """Return whether to stop. It is called after each step; on True every running trial writes a checkpoint, and
        `InterruptedRun` is raised.
        """
        return False
