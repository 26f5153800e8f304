"""Arms, trials, and the four outcomes of a trial.

Losses are in nats: per label token for language models, per example for classification.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from rightrank.schema.errors import MAX_EXACT_INTEGER, redact_secrets

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCHEMA_VERSION = 6  # of the journal; other versions are not read
IDENTITY_VERSION = 1  # of the hashed content of a trial id; a change gives every trial a new id

BoundedInt: TypeAlias = Annotated[int, Field(ge=-MAX_EXACT_INTEGER, le=MAX_EXACT_INTEGER)]
# Text of an error of another library, with secrets redacted.
RedactedText: TypeAlias = Annotated[str, AfterValidator(redact_secrets)]

Floats: TypeAlias = "NDArray[np.float64]"
Groups: TypeAlias = "NDArray[np.int64]"  # the group number of each example
MetricName: TypeAlias = str  # `loss`, `accuracy`, or the name of a metric in the settings
SplitName: TypeAlias = Literal["train", "validation", "test"]


def round_digits(number: float) -> float:
    """Round to nine significant digits: numbers that differ in their last bits alone, as 3 * 1e-4 and 3e-4 do, are equal."""
    return float(f"{number:.9g}")


class Record(BaseModel):
    """A frozen record. Two records are equal if their fields are."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def hash_content(value: JsonValue | dict[str, Any]) -> str:
    """Return the SHA-256 of a JSON value with sorted keys, in hex."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class ArmFields(Record):
    """Everything that may differ between the trainings of a selection.

    A training may be stopped early (`stop_at`), and another arm may resume it (`continue_from`). An adapter may be
    truncated to a lower rank (`truncate_from`); `steps` are then 0.
    """

    rank: BoundedInt = Field(ge=0)  # 0: the base model, which is evaluated but not trained
    learning_rate: float = Field(ge=0)
    lora_alpha: float = Field(gt=0)
    seed: BoundedInt = Field(ge=0)  # of the batch order, the initial A, and dropout
    steps: BoundedInt = Field(ge=0)  # optimizer steps, the length of the learning rate schedule
    stop_at: BoundedInt | None = Field(default=None, gt=0)  # stop after this many steps; the schedule is unchanged
    continue_from: str | None = None  # id of a trial of the same arm that was stopped early
    truncate_from: str | None = None  # id of a finished trial at this rank or a higher one

    @property
    def arm(self) -> Arm:
        return Arm(**{name: getattr(self, name) for name in ArmFields.model_fields})

    @property
    def is_direct(self) -> bool:
        """Return whether this is a complete training, as the comparison of ranks requires."""
        return self.stop_at is None and self.truncate_from is None

    @property
    def is_searched(self) -> bool:
        """Return whether this is the beginning of a training, which the learning-rate search compares."""
        return self.stop_at is not None and self.continue_from is None

    @property
    def end(self) -> int:
        """Return the step at which the training ends."""
        return self.steps if self.stop_at is None else self.stop_at


class Arm(ArmFields):
    """A configuration to train. A trial is one training of it."""

    def format_label(self) -> str:
        """Return a short name, such as `r=8 lr=0.0001 seed=0`."""
        if self.rank == 0:
            return "base"
        name = f"r={self.rank} lr={self.learning_rate:g} seed={self.seed}"
        return f"{name} {self.format_stage()}" if self.format_stage() else name

    def format_stage(self) -> str:
        """Return how the arm differs from a complete training, or an empty text."""
        if self.truncate_from is not None:
            return "truncated"
        return "" if self.stop_at is None else f"to step {self.stop_at}"


class Trial(Record):
    """An arm and its trial id."""

    trial_id: str
    arm: Arm

    @property
    def fields(self) -> dict[str, Any]:
        """Return the fields with which every record of the trial begins."""
        return {"trial_id": self.trial_id, **self.arm.model_dump()}


def compute_trial_id(context_fingerprint: str, arm: Arm) -> str:
    """Return the id of a trial: 12 hex digits of a hash of everything that defines it.

    `context_fingerprint` covers the model, the data and the settings that all arms share.
    """
    arm_fields = arm.model_dump(exclude_none=True)
    return hash_content({"schema": IDENTITY_VERSION, "context": context_fingerprint, "arm": arm_fields})[:12]


class EvalPoint(Record):
    """The held-out value at a step of a training. If a custom trainer reports NaN, the trial has diverged."""

    step: BoundedInt
    value: float
    mean_value: float | None = None  # the value of the mean of the factors since the warm-up
    train_value: float | None = None  # mean training loss since the previous point, over the same batches for every arm
    example_scores: list[float] | None = (
        None  # scores of the evaluation subset: the same examples at every step of every trial
    )


class JournalLine(Record):
    """A record of a journal, with the version of its fields."""

    schema_version: BoundedInt = SCHEMA_VERSION


class TrialRecord(ArmFields, JournalLine):
    trial_id: str


class TrialStarted(TrialRecord):
    type: Literal["trial_started"] = "trial_started"


class ExampleScores(Record):
    """Scores by example. Lists have the order of the run's `evaluation_examples`, or of its test split."""

    # summed over the example's label tokens, nats
    example_losses: list[float] = Field(default_factory=list)
    example_tokens: list[BoundedInt] = Field(default_factory=list)  # label tokens of the example
    # the learning-rate search: the same losses with the mean of the factors over the last quarter of the steps
    mean_losses: list[float] = Field(default_factory=list)
    example_correct: list[BoundedInt] | None = None  # classification: 1 if the prediction is correct
    example_scores: list[float] | None = None  # custom trainers and tables: the metric of each example
    example_weights: list[float] | None = None  # of example_scores; None: equal weights
    example_groups: list[BoundedInt] | None = None  # the group number of each example; None: no groups
    # metric of generated answers → one value per example
    example_metrics: dict[str, list[float]] = Field(default_factory=dict)

    def get_weighted_scores(self, metric: str) -> tuple[Sequence[float], Sequence[float]] | None:
        """Return `(scores times weights, weights)` of a metric by example, in the metric's direction, or None if it was not measured."""
        if metric == "loss" and self.example_losses:
            return self.example_losses, self.example_tokens
        if self.example_scores is not None:  # the deciding metric, whatever name the custom trainer uses
            weights = self.example_weights or [1.0] * len(self.example_scores)
            return [score * weight for score, weight in zip(self.example_scores, weights, strict=True)], weights
        scores = self.example_metrics.get(metric)
        if metric == "accuracy" and self.example_correct is not None:
            scores = [float(correct) for correct in self.example_correct]
        return None if scores is None else (scores, [1.0] * len(scores))


class TrialFinished(TrialRecord, ExampleScores):
    """A trial that ended with a result."""

    type: Literal["trial_finished"] = "trial_finished"
    value: float  # of the deciding metric, on the validation split
    metrics: dict[str, float]  # all metrics measured on the validation split
    failed_metrics: dict[str, str] = Field(default_factory=dict)  # metric → why it has no value
    truncation: Literal["svd", "kfac"] | None = None  # how an adapter was truncated; None: it was not
    checkpoint_step: BoundedInt | None = None  # the step of the best checkpoint, if that was kept; None: the last one
    checkpoint_is_mean: bool = False  # whether that is the mean of the factors since the warm-up
    value_metric: str | None = (
        None  # the metric of `value`, if it is not the deciding one: early stopping generates no answers
    )
    train_value: float | None = None  # mean training loss since the last point
    points: list[EvalPoint] = Field(default_factory=list)
    seed_deviation: float | None = None  # tables: the stated standard deviation over seeds
    averaged_seeds: BoundedInt = 1  # tables: the number of seeds that `value` averages
    # The cost; 0: unknown.
    trainable_parameters: BoundedInt = 0
    train_seconds: float = 0.0
    train_tokens: BoundedInt = 0  # with and without labels, excluding padding
    eval_seconds: float = 0.0
    peak_bytes: BoundedInt = 0  # allocated on the device; on the CPU, growth of the resident memory
    # The number of adapters that share the passes and the peak; seconds are divided evenly.
    adapters_per_pass: BoundedInt = 1
    train_losses: list[float] = Field(default_factory=list)  # nats per label, one per step

    def use_mean_losses(self) -> TrialFinished:
        """Return the record with the losses of the mean of the factors in place of those of the current ones, if it has them."""
        if not self.mean_losses:
            return self
        loss = sum(self.mean_losses) / sum(self.example_tokens)
        changes = {"example_losses": self.mean_losses, "metrics": self.metrics | {"loss": loss}, "mean_losses": []}
        return self.model_copy(update=changes)

    @property
    def seconds(self) -> float:
        """Return the seconds of training and evaluation."""
        return self.train_seconds + self.eval_seconds


class TrialDiverged(TrialRecord):
    """A trial whose loss became NaN or rose above the base model's. It is a missing value and no evidence against a rank."""

    type: Literal["trial_diverged"] = "trial_diverged"
    step: BoundedInt
    reason: RedactedText

    @property
    def end_text(self) -> str:
        return f"diverged at step {self.step}: {self.reason}"


class TrialEvaluated(JournalLine):
    """A held-out value that a running trial reported. If the trial is run again, its earlier evaluations are dropped."""

    type: Literal["trial_evaluated"] = "trial_evaluated"
    trial_id: str
    step: BoundedInt
    value: float
    example_scores: list[float] | None = None

    @property
    def point(self) -> EvalPoint:
        return EvalPoint(step=self.step, value=self.value, example_scores=self.example_scores)


class TrialFailed(TrialRecord):
    """A trial that ended with an error."""

    type: Literal["trial_failed"] = "trial_failed"
    error: Literal["out_of_memory", "error"]
    reason: RedactedText

    @property
    def end_text(self) -> str:
        return f"failed: {self.reason}"


TrialOutcome: TypeAlias = TrialFinished | TrialDiverged | TrialFailed
OUTCOMES = (TrialFinished, TrialDiverged, TrialFailed)
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


def count_added_steps(arm: ArmFields, finished: Mapping[str, TrialFinished]) -> int:
    """Return the optimizer steps that `arm` adds to those of the trial that it resumes; `finished` maps ids to trials."""
    resumed = finished.get(arm.continue_from or "")
    return arm.end - (0 if resumed is None else resumed.end)


def compute_added_seconds(outcome: TrialFinished, finished: Mapping[str, TrialFinished]) -> float:
    """Return the seconds of training and evaluation that `outcome` adds to those of the trial that it resumes."""
    resumed = finished.get(outcome.continue_from or "")
    return outcome.seconds - (0.0 if resumed is None else resumed.seconds)
