"""The records that every part of `rightrank` speaks in: frozen, typed, one JSON object each.

An `Arm` is what a strategy asks for. A `Trial` is an arm with the identity that the run gives it.
Trials end in exactly one of `TrialFinished`, `TrialDiverged` or `TrialFailed`. A `Decision` is what
`decide` makes of finished trials.

Losses are in nats: per label token for language models, per item for classification.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

SCHEMA_VERSION = 1

MetricName: TypeAlias = Literal["loss", "accuracy"]
SplitName: TypeAlias = Literal["train", "selection", "test"]
Verdict: TypeAlias = Literal["saturated", "rising", "overfitting", "flat", "undecided", "no_gain"]


class Record(BaseModel):
    """A frozen value; equal when its fields are."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ArmFields(Record):
    """Everything that may differ between the trainings of a selection.

    A training may be stopped part of the way (`stop_at`) and another arm go on from there (`continue_from`). An
    adapter may be cut to a lower rank (`truncate_from`); `steps` are then the recovery steps after the cut, 0 for none.
    Both name the trial they come from.
    """

    rank: int = Field(ge=0)  # 0 is the base model itself, evaluated and never trained
    learning_rate: float = Field(ge=0)
    lora_alpha: float = Field(gt=0)
    seed: int = Field(ge=0)  # of the batch order, of the first A, and of dropout
    steps: int = Field(ge=0)  # optimizer steps, which the rate's schedule spans
    stop_at: int | None = Field(default=None, gt=0)  # end after this many of the steps, the schedule unchanged
    continue_from: str | None = None  # trial id: the same arm, stopped early
    truncate_from: str | None = None  # trial id: a finished training at a rank not below this one
    init_lora_weights: str | None = None  # None: as the settings say

    @property
    def arm(self) -> Arm:
        return Arm(**{name: getattr(self, name) for name in ArmFields.model_fields})


class Arm(ArmFields):
    """One training to run."""

    @property
    def is_direct(self) -> bool:
        """A whole training from its own start: what ranks are compared by."""
        return self.stop_at is None and self.truncate_from is None

    def label(self) -> str:
        """A short name for a person."""
        if self.rank == 0:
            return "base"
        parts = [f"r={self.rank} lr={self.learning_rate:g} seed={self.seed}"]
        if self.truncate_from is not None:
            parts.append(f"truncated, {self.steps} steps of recovery")
        if self.stop_at is not None:
            parts.append(f"to step {self.stop_at}")
        return " ".join(parts)


class Trial(Record):
    """An arm and the identity that the run gives it."""

    trial_id: str
    arm: Arm


def trial_id(context_fingerprint: str, arm: Arm) -> str:
    """The identity of a trial: 12 hex digits of a hash of all that defines it, never a position.

    `context_fingerprint` stands for the model, the data and the settings that all arms share.
    """
    arm_fields = arm.model_dump(exclude_none=True)  # a field that says nothing new leaves old identities as they are
    return content_hash({"schema": SCHEMA_VERSION, "context": context_fingerprint, "arm": arm_fields})[:12]


def content_hash(value: JsonValue | dict[str, Any]) -> str:
    """SHA-256 in hex of a JSON value with sorted keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class EvalPoint(Record):
    """The held-out value part of the way through a training."""

    step: int
    value: float
    train_value: float | None  # mean training loss since the point before, the same batches for every arm


class TrialStarted(ArmFields):
    type: Literal["trial_started"] = "trial_started"
    schema_version: int = SCHEMA_VERSION
    trial_id: str


class TrialFinished(ArmFields):
    """A trial that ended with a result. Item lists follow the order of the run's evaluation items."""

    type: Literal["trial_finished"] = "trial_finished"
    schema_version: int = SCHEMA_VERSION
    trial_id: str
    value: float  # held-out, the decision's metric, on the selection split
    metrics: dict[str, float]  # every metric measured on the selection split
    item_losses: list[float]  # summed over the item's label tokens, nats
    item_tokens: list[int]  # label tokens of the item
    item_correct: list[int] | None = None  # classification: 1 where the prediction is right
    train_value: float | None  # mean training loss of the last stretch before the end
    points: list[EvalPoint]
    trainable_parameters: int
    train_seconds: float
    train_tokens: int  # labelled and unlabelled, no padding
    eval_seconds: float
    peak_bytes: int  # allocated on the device; on the CPU, the growth of the process's resident memory


class TrialDiverged(ArmFields):
    """A trial whose loss became NaN or rose above the base's: a missing cell, not evidence against a rank."""

    type: Literal["trial_diverged"] = "trial_diverged"
    schema_version: int = SCHEMA_VERSION
    trial_id: str
    step: int
    reason: str


class TrialFailed(ArmFields):
    """A trial that could not be run to its end."""

    type: Literal["trial_failed"] = "trial_failed"
    schema_version: int = SCHEMA_VERSION
    trial_id: str
    error: Literal["out_of_memory", "error"]
    reason: str


TrialOutcome: TypeAlias = TrialFinished | TrialDiverged | TrialFailed


class SplitSummary(Record):
    """What a split holds after tokenising."""

    items: int
    tokens: int
    label_tokens: int
    truncated: int  # items cut to the length limit
    dropped: int  # items left without a label token


class DataSummary(Record):
    """What was understood of the data."""

    form: Literal["text", "prompt_completion", "messages", "classification"]
    splits: dict[str, SplitSummary]
    splits_given: bool
    duplicates_across_splits: int
    classes: list[str] | None = None


class RunStarted(Record):
    """The first line of a journal: all that the trials share."""

    type: Literal["run_started"] = "run_started"
    schema_version: int = SCHEMA_VERSION
    rightrank_version: str
    fingerprint: str
    settings: dict[str, JsonValue]
    environment: dict[str, str]
    data: DataSummary
    evaluation_items: list[str]  # content hashes, in the order of every item list
    metric: MetricName
    higher_is_better: bool
    started_at: str


class TestEvaluated(Record):
    """A finished trial's number on the split that selection never saw."""

    __test__ = False  # not a test, whatever pytest thinks of the name

    type: Literal["test_evaluated"] = "test_evaluated"
    schema_version: int = SCHEMA_VERSION
    trial_id: str
    rank: int
    value: float
    item_losses: list[float]
    item_tokens: list[int]
    item_correct: list[int] | None = None


class Sample(Record):
    """A held-out item and what the model writes for it before and after training."""

    type: Literal["sample"] = "sample"
    schema_version: int = SCHEMA_VERSION
    trial_id: str
    item_id: str
    prompt: str
    expected: str
    before: str
    after: str


class RankEvidence(Record):
    """What is known of one rank."""

    rank: int
    value: float
    low: float
    high: float
    difference: float | None = None  # worse than the reference by this much, in the metric's unit
    difference_high: float | None = None  # 95% upper bound of it
    non_inferior: bool | None = None
    learning_rate: float | None = None
    seeds: int = 1
    trial_ids: list[str] = []


class StaircaseStep(Record):
    """From this margin on, this rank is enough."""

    margin: float
    rank: int


class Decision(Record):
    """The answer and its evidence."""

    rank: int | None  # None where the evidence names none
    fallback_rank: int  # the smallest rank shown to be enough: what is handed over when `rank` is None
    verdict: Verdict
    flags: list[str]
    sentence: str  # for a person
    next_run: str  # what would settle or extend it
    metric: str
    higher_is_better: bool
    margin: float
    reference_rank: int
    confidence: float
    learning_rate: float | None
    staircase: list[StaircaseStep]
    ranks: list[RankEvidence]


class Decided(Record):
    """A decision in the journal, with what was handed over."""

    type: Literal["decided"] = "decided"
    schema_version: int = SCHEMA_VERSION
    decision: Decision
    adapter_trial_id: str | None


JournalRecord: TypeAlias = Annotated[
    RunStarted | TrialStarted | TrialFinished | TrialDiverged | TrialFailed | TestEvaluated | Sample | Decided,
    Field(discriminator="type"),
]
JOURNAL_RECORD: TypeAdapter[JournalRecord] = TypeAdapter(JournalRecord)


class StepDone(Record):
    """Progress of a running trial; shown, never journalled."""

    trial_id: str
    step: int
    steps: int
    loss: float
    seconds: float  # since the trial began


class Preparing(Record):
    """Progress of the work that comes before the first training: the frozen layers, once for each item."""

    items: int
    of_items: int
    seconds: float


RunEvent: TypeAlias = Preparing | StepDone | TrialStarted | TrialFinished | TrialDiverged | TrialFailed | Decided
