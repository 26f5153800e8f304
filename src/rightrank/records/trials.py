"""Arms, trials, and the three ways in which a trial ends.

Losses are in nats: per label token for language models, per item for classification.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import AliasChoices, ConfigDict, Field, model_validator

from rightrank.records.base import IDENTITY_VERSION, SCHEMA_VERSION, Record, Whole, content_hash

# `pack_size` until schema 2
ADAPTERS_PER_PASS = AliasChoices("adapters_per_pass", "pack_size")


class ArmFields(Record):
    """Everything that may differ between the trainings of a selection.

    A training may be stopped part of the way (`stop_at`) and another arm go on from there (`continue_from`). An
    adapter may be cut to a lower rank (`truncate_from`); `steps` are then the recovery steps after the cut, 0 for none.
    Both name the trial they come from.
    """

    rank: Whole = Field(ge=0)  # 0 is the base model itself, evaluated and never trained
    learning_rate: float = Field(ge=0)
    lora_alpha: float = Field(gt=0)
    seed: Whole = Field(ge=0)  # of the batch order, of the first A, and of dropout
    steps: Whole = Field(ge=0)  # optimizer steps, which the rate's schedule spans
    stop_at: Whole | None = Field(default=None, gt=0)  # end after this many of the steps, the schedule unchanged
    continue_from: str | None = None  # trial id: the same arm, stopped early
    truncate_from: str | None = None  # trial id: a finished training at a rank not below this one
    anneal_from: Whole | None = None  # from this step the learning rate decays linearly to 0 at `stop_at`
    init_lora_weights: str | None = None  # None: as the settings say
    target_modules: tuple[str, ...] | None = None  # None: as the settings say
    equal_parameters: bool | None = None  # True: at the rank that has as many as `rank` over the settings' modules

    @property
    def arm(self) -> Arm:
        return Arm(**{name: getattr(self, name) for name in ArmFields.model_fields})

    def is_plain(self, lora_alpha: float) -> bool:
        """At the setting that all ranks share, whose alpha is given, and not at a variant's of a sweep."""
        return self.lora_alpha == lora_alpha and self.init_lora_weights is None and self.target_modules is None


class Arm(ArmFields):
    """One training to run."""

    @property
    def is_direct(self) -> bool:
        """A whole training from its own start: what ranks are compared by."""
        return self.stop_at is None and self.truncate_from is None

    @property
    def is_annealed(self) -> bool:
        """A copy of a stopped training, decayed to a learning rate of 0 to be compared and thrown away."""
        return self.anneal_from is not None

    def label(self) -> str:
        """A short name for a person."""
        if self.rank == 0:
            return "base"
        name = f"r={self.rank} lr={self.learning_rate:g} seed={self.seed}"
        return f"{name} {self.stage()}" if self.stage() else name

    def stage(self) -> str:
        """What sets the arm apart from a whole training; empty for one."""
        if self.truncate_from is not None:
            return f"cut, {self.steps} steps of recovery" if self.steps else "cut"
        if self.is_annealed:
            return f"annealed to step {self.stop_at}"
        return "" if self.stop_at is None else f"to step {self.stop_at}"


class Trial(Record):
    """An arm and the identity that the run gives it."""

    trial_id: str
    arm: Arm


def trial_id(context_fingerprint: str, arm: Arm) -> str:
    """The identity of a trial: 12 hex digits of a hash of all that defines it, never a position.

    `context_fingerprint` stands for the model, the data and the settings that all arms share.
    """
    arm_fields = arm.model_dump(exclude_none=True)  # a field that says nothing new leaves old identities as they are
    return content_hash({"schema": IDENTITY_VERSION, "context": context_fingerprint, "arm": arm_fields})[:12]


class EvalPoint(Record):
    """The held-out value part of the way through a training."""

    step: Whole
    value: float
    train_value: float | None  # mean training loss since the point before, the same batches for every arm


class TrialStarted(ArmFields):
    type: Literal["trial_started"] = "trial_started"
    schema_version: Whole = SCHEMA_VERSION
    trial_id: str


class TrialFinished(ArmFields):
    """A trial that ended with a result. Item lists follow the order of the run's evaluation items."""

    type: Literal["trial_finished"] = "trial_finished"
    schema_version: Whole = SCHEMA_VERSION
    trial_id: str
    value: float  # held-out, the decision's metric, on the selection split
    metrics: dict[str, float]  # every metric measured on the selection split
    item_losses: list[float]  # summed over the item's label tokens, nats
    item_tokens: list[Whole]  # label tokens of the item
    item_correct: list[Whole] | None = None  # classification: 1 where the prediction is right
    item_scores: list[float] | None = None  # of a trainer of one's own: the metric itself, item by item
    item_weights: list[float] | None = None  # beside item_scores; None: all alike
    item_metrics: dict[str, list[float]] = Field(default_factory=dict)  # of written answers and tasks, one an item
    failed_metrics: dict[str, str] = Field(default_factory=dict)  # name: why there is none
    value_metric: str | None = (
        None  # of `value`, where it is not the decision's: a training stopped early has no answers
    )
    averaged_loss: float | None = (
        None  # held-out, of the mean of A and of B over the second half of the steps; early looks
    )
    train_value: float | None  # mean training loss of the last stretch before the end
    points: list[EvalPoint]
    trainable_parameters: Whole
    train_seconds: float
    train_tokens: Whole  # labelled and unlabelled, no padding
    eval_seconds: float
    answer_seconds: float = 0.0  # of them: what the model's answers at the end took, with their scoring
    peak_bytes: Whole  # allocated on the device; on the CPU, the growth of the process's resident memory
    predicted_peak_bytes: Whole | None = None  # allocated by tensors, as planned before the start; None: not planned
    adapters_per_pass: Whole = Field(
        default=1, validation_alias=ADAPTERS_PER_PASS
    )  # arms that shared the passes, and the peak; the seconds are this arm's even share
    pass_ranks: list[Whole] = Field(default_factory=list)  # of the adapters that shared the fullest pass, its own first
    train_losses: list[float] = Field(default_factory=list)  # nats a label, one for each step

    @model_validator(mode="after")
    def _items_alike(self) -> TrialFinished:
        weighed = self.item_scores is not None and self.item_weights is not None
        if len(self.item_losses) != len(self.item_tokens) or (
            weighed and len(self.item_scores or ()) != len(self.item_weights or ())
        ):
            raise ValueError("its items have scores and weights of different number")
        return self

    def items(self, metric: str) -> tuple[list[float], list[float]] | None:
        """`(scores summed over the item's weight, weights)` of a metric, in its own direction; None without items."""
        if metric == "loss" and self.item_losses:
            return self.item_losses, [float(tokens) for tokens in self.item_tokens]
        if self.item_scores is not None:  # of the metric that decides, whatever a trainer of one's own calls it
            weights = self.item_weights or [1.0] * len(self.item_scores)
            return [score * weight for score, weight in zip(self.item_scores, weights, strict=True)], weights
        scores = self.item_metrics.get(metric)
        if metric == "accuracy" and self.item_correct is not None:
            scores = [float(correct) for correct in self.item_correct]
        return None if scores is None else (scores, [1.0] * len(scores))


class TrialDiverged(ArmFields):
    """A trial whose loss became NaN or rose above the base's: a missing cell, not evidence against a rank."""

    type: Literal["trial_diverged"] = "trial_diverged"
    schema_version: Whole = SCHEMA_VERSION
    trial_id: str
    step: Whole
    reason: str


class TrialFailed(ArmFields):
    """A trial that could not be run to its end."""

    type: Literal["trial_failed"] = "trial_failed"
    schema_version: Whole = SCHEMA_VERSION
    trial_id: str
    error: Literal["out_of_memory", "error"]
    reason: str


TrialOutcome: TypeAlias = TrialFinished | TrialDiverged | TrialFailed


class TrialTask(Record):
    """What a trainer of one's own is asked for: one training, or the base's evaluation where the rank is 0."""

    trial_id: str
    rank: Whole
    learning_rate: float
    lora_alpha: float
    seed: Whole
    steps: Whole  # 0: as the trainer has it
    folder: Path  # there, and the trial's own: an adapter saved into it is handed over if the trial is chosen


class TrialResult(Record):
    """What a trainer of one's own may return in place of a mapping of metrics. A NaN counts as diverged."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)

    metrics: dict[str, float]  # held-out; the metric decided by is one of them
    item_scores: list[float] | None = None  # that metric for each held-out item, the same items in every trial
    item_weights: list[float] | None = None  # such as the tokens of each item; None: all alike
    train_value: float | None = None  # the metric on training data at the end
    points: list[EvalPoint] = Field(default_factory=list)  # held-out values on the way
    trainable_parameters: Whole = 0
    train_tokens: Whole = 0
    train_seconds: float | None = None  # None: the whole call
    eval_seconds: float = 0.0
    peak_bytes: Whole = 0
