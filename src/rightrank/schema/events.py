"""The records of a run's journal, and the events that an observer receives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, JsonValue, TypeAdapter, field_validator

from rightrank.schema.decision import AdapterAnswer, AdapterOrigin, Decision, HandedOver, NextRun
from rightrank.schema.trials import (
    MAX_WHOLE,
    SCHEMA_VERSION,
    Record,
    TrialCollapsed,
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialLook,
    TrialOutcome,
    TrialStarted,
    Whole,
)


@dataclass(frozen=True, slots=True)
class Observer:
    """Callbacks of a running selection; each one that is left out does nothing.

    All callbacks run on the thread that calls `select_rank`, so a slow one slows the selection down. An exception
    that a callback raises ends the selection; what has finished stays in the journal.

    Example::

        select_rank(model, data, "run", watching=Observer(notice=print, should_stop=lambda: time.time() > deadline))
    """

    on_event: Callable[[RunEvent], None] = lambda _: None
    """Receives each step, each trial that starts and each trial that ends."""

    on_plan: Callable[[RunStarted, int, int], None] = lambda _started, _arms, _steps: None
    """Receives the run's start, the expected number of arms and the steps of each, once before the first trial."""

    on_resume: Callable[[Sequence[TrialOutcome]], None] = lambda _: None
    """Receives the outcomes of the trials that ended before this process started, if there are any."""

    notice: Callable[[str], None] = lambda _: None
    """Receives one line for a person."""

    should_stop: Callable[[], bool] = lambda: False
    """Is asked after each step; on True every running trial writes a checkpoint and `InterruptedRun` is raised."""

    on_cost: Callable[[float], None] = lambda _: None
    """Receives the expected cost in whole trainings, once before the first trial."""

    on_time: Callable[[float], None] = lambda _: None
    """Receives the expected seconds, once before the first trial, where they are known by then."""

    on_cost_limit: Callable[[float], None] = lambda _: None
    """Receives the largest cost in whole trainings that the strategy can have, once before the first trial."""


class GuardEvaluated(Record):
    """The losses of one adapter, or of the base (rank 0), on one guard file. Lists have the file's order of examples."""

    type: Literal["guard_evaluated"] = "guard_evaluated"
    schema_version: Whole = SCHEMA_VERSION
    file: str
    fingerprint: str  # of the examples
    trial_id: str
    rank: Whole
    item_losses: list[float]
    item_tokens: list[Whole]


class GuardFile(Record):
    """The handed-over adapter against the base on one guard file. Differences above 0 are worse, in nats."""

    file: str
    difference: float
    difference_high: float  # upper bound; see `GuardAnswer.confidence`
    holds: bool  # the bound is below the guard's margin
    examples: Whole


class GuardCandidate(Record):
    """One adapter on the task and on the guard's worst file."""

    trial_id: str
    rank: Whole
    how: AdapterOrigin
    learning_rate: float
    seed: Whole
    task_value: float
    task_difference: float  # from the reference adapter, metric's unit; above 0 is worse
    task_holds: bool
    guard_difference: float  # from the base, nats; above 0 is worse
    guard_difference_high: float
    guard_holds: bool


class GuardAnswer(Record):
    """Whether the handed-over adapter is no worse than the base on every guard file. The outer figures are the worst file's."""

    difference: float
    difference_high: float
    holds: bool
    margin: float
    confidence: float  # of each bound, so that the chosen adapter keeps the guard with 95%
    files: list[GuardFile]
    task_rank: Whole  # the answer by the task alone
    task_trial_id: str
    candidates: list[GuardCandidate] = Field(default_factory=list)  # every finished adapter, by descending rank
    sentence: str
    next_run: NextRun | None = None  # the run that might be both, where no adapter is


class SplitSummary(Record):
    """Counts of a split after tokenising."""

    items: Whole
    tokens: Whole
    label_tokens: Whole
    truncated: Whole  # examples truncated to the length limit
    dropped: Whole  # examples without a label token
    equal: Whole = 0  # preference pairs whose answers are the same within the length limit


class DataSummary(Record):
    """How the data was read."""

    # own: read by a custom trainer
    form: Literal["text", "prompt_completion", "messages", "classification", "tokens", "preference", "own"]
    splits: dict[str, SplitSummary]
    splits_given: bool
    duplicates_across_splits: Whole
    classes: list[str] | None = None
    unreadable: Whole = 0  # rows left out because of lone surrogates, which no tokenizer accepts
    control_characters: Whole = 0  # examples with control characters; they are kept
    rows: Whole = 0  # that were read
    repeated: Whole = 0  # held-out rows left out because another row is equal
    not_evaluated: Whole = 0  # held-out rows beyond the number that is evaluated
    shape: str | None = None  # how rows of another shape got the form's columns, for people
    renamed: dict[str, str] = Field(
        default_factory=dict
    )  # columns of the form that have another name in the file → that name
    equal_pairs: Whole = 0  # rows left out because `chosen` and `rejected` are the same

    @property
    def is_token_loss(self) -> bool:
        """Whether the loss is a mean over label tokens, for which a default margin is known."""
        return self.form not in ("classification", "preference")


class RunStarted(Record):
    """The first line of a journal: everything that the trials share."""

    type: Literal["run_started"] = "run_started"
    schema_version: Whole = SCHEMA_VERSION
    rightrank_version: str
    fingerprint: str
    settings: dict[str, JsonValue]
    environment: dict[str, str]
    data: DataSummary
    evaluation_items: list[str]  # content hashes, in the order of all lists of examples
    metric: str
    higher_is_better: bool
    points_metric: str | None = None  # of the evaluations during a training, if it is not the deciding metric
    started_at: str

    @field_validator("settings")
    @classmethod
    def _numbers_exact(cls, settings: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if any(isinstance(value, int) and abs(value) > MAX_WHOLE for value in settings.values()):
            raise ValueError(f"a setting is a number beyond {MAX_WHOLE}")
        return settings


class TestEvaluated(Record):
    """A finished trial's value on the test split, which the selection never uses."""

    __test__ = False  # the class is not a pytest test

    type: Literal["test_evaluated"] = "test_evaluated"
    schema_version: Whole = SCHEMA_VERSION
    trial_id: str
    rank: Whole
    value: float
    item_losses: list[float]
    item_tokens: list[Whole]
    item_correct: list[Whole] | None = None
    item_metrics: dict[str, list[float]] = Field(default_factory=dict)  # by metric: one value per example
    metrics: dict[str, float] = Field(default_factory=dict)  # all metrics measured on the test split
    metric: str | None = None  # of `value`, if it is not the deciding metric: a task has no test split


class Sample(Record):
    """A held-out example and the model's answers before and after training."""

    type: Literal["sample"] = "sample"
    schema_version: Whole = SCHEMA_VERSION
    trial_id: str
    item_id: str
    prompt: str
    expected: str
    before: str
    after: str


class Certified(Record):
    """An arm trained again alone, compared with its multi-LoRA training. Differences are relative unless stated."""

    type: Literal["certified"] = "certified"
    schema_version: Whole = SCHEMA_VERSION
    trial_id: str
    rank: Whole
    adapters_per_pass: Whole
    steps: Whole
    first_step_difference: float  # of the training loss
    loss_difference: float  # of the training loss, the maximum over all steps
    adapter_difference: float  # of the norm of the final adapter's tensors
    value_difference: float  # of the held-out value; absolute
    seed_difference: float | None  # between two seeds of one rank and learning rate; absolute; None: one seed
    exact: bool  # the model is in float32
    passed: bool | None  # None: not in float32, and no second seed to compare with

    def sentence(self) -> str:
        """The comparison in one paragraph."""
        where = f"with {self.adapters_per_pass} adapters per pass" if self.adapters_per_pass > 1 else "alone"
        yardstick = "" if self.seed_difference is None else f" (two seeds differ by {self.seed_difference:.2g})"
        verdict = {True: "the same", False: "NOT the same", None: "no second seed to compare with"}[self.passed]
        return (
            f"Rank {self.rank} was trained {where} and again alone: {verdict}. Relative differences: "
            f"{self.first_step_difference:.1e} in the first step's loss, {self.loss_difference:.1e} at most in "
            f"{self.steps} steps, {self.adapter_difference:.1e} in the adapter; held-out {self.value_difference:.1e}{yardstick}."
        )


class RunContinued(Record):
    """The run was continued with other values of settings that change no trial; they hold from here on."""

    type: Literal["run_continued"] = "run_continued"
    schema_version: Whole = SCHEMA_VERSION
    settings: dict[str, JsonValue]
    evaluation_items: list[str] | None = None  # with more validation examples: all of them, those of before first
    data: DataSummary | None = None  # with more validation examples


class AdapterRecorded(Record):
    """The answer to the first question, and what `adapter/` holds from then on."""

    type: Literal["adapter_recorded"] = "adapter_recorded"
    schema_version: Whole = SCHEMA_VERSION
    answer: AdapterAnswer
    handed_over: HandedOver
    trainings: float  # cost up to the answer, in whole trainings
    guard: GuardAnswer | None = None  # of the handed-over adapter; None without guard data


class DecisionRecorded(Record):
    """A decision, and the trial whose adapter is the result."""

    type: Literal["decided"] = "decided"
    schema_version: Whole = SCHEMA_VERSION
    decision: Decision
    adapter_trial_id: str | None


JournalRecord: TypeAlias = Annotated[
    RunStarted
    | TrialStarted
    | TrialLook
    | TrialFinished
    | TrialCollapsed
    | TrialDiverged
    | TrialFailed
    | TestEvaluated
    | GuardEvaluated
    | Sample
    | Certified
    | RunContinued
    | AdapterRecorded
    | DecisionRecorded,
    Field(discriminator="type"),
]


JOURNAL_RECORD: TypeAdapter[JournalRecord] = TypeAdapter(JournalRecord)


class StepDone(Record):
    """Progress of a running trial; not part of the journal."""

    trial_id: str
    step: Whole
    steps: Whole
    loss: float
    seconds: float  # since the trial started


class Preparing(Record):
    """Progress of the work before the first training: the outputs of the frozen layers for each example."""

    items: Whole
    of_items: Whole
    seconds: float


RunEvent: TypeAlias = (
    Preparing
    | StepDone
    | TrialStarted
    | TrialLook
    | TrialFinished
    | TrialCollapsed
    | TrialDiverged
    | TrialFailed
    | DecisionRecorded
)
