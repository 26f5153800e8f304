"""The records that every part of `rightrank` speaks in: frozen, typed, one JSON object each.

An `Arm` is what a strategy asks for. A `Trial` is an arm with the identity that the run gives it.
Trials end in exactly one of `TrialFinished`, `TrialDiverged` or `TrialFailed`. A `Decision` is what
`decide` makes of finished trials.

Losses are in nats: per label token for language models, per item for classification.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

if TYPE_CHECKING:
    from pandas import DataFrame

SCHEMA_VERSION = 1

# Whole numbers that a float holds exactly: a larger one in a file is damage, and would break what computes with it.
LARGEST_WHOLE = 2**53
Whole: TypeAlias = Annotated[int, Field(ge=-LARGEST_WHOLE, le=LARGEST_WHOLE)]

MetricName: TypeAlias = Literal["loss", "accuracy"]
SplitName: TypeAlias = Literal["train", "selection", "test"]
Basis: TypeAlias = Literal["items and seeds", "items", "seeds", "std", "values"]
Verdict: TypeAlias = Literal["saturated", "rising", "overfitting", "flat", "undecided", "no_gain"]


class Record(BaseModel):
    """A frozen value; equal when its fields are."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def _repr_html_(self) -> str | None:
        """What a notebook shows; None leaves it to `repr`."""
        from rightrank.report.notebook import html_of  # the one view a record knows of, when a notebook asks

        return html_of(self)


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
        name = f"r={self.rank} lr={self.learning_rate:g} seed={self.seed}"
        return f"{name} {self.stage()}" if self.stage() else name

    def stage(self) -> str:
        """What sets the arm apart from a whole training; empty for one."""
        if self.truncate_from is not None:
            return f"cut, {self.steps} steps of recovery" if self.steps else "cut"
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
    return content_hash({"schema": SCHEMA_VERSION, "context": context_fingerprint, "arm": arm_fields})[:12]


def content_hash(value: JsonValue | dict[str, Any]) -> str:
    """SHA-256 in hex of a JSON value with sorted keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


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
    train_value: float | None  # mean training loss of the last stretch before the end
    points: list[EvalPoint]
    trainable_parameters: Whole
    train_seconds: float
    train_tokens: Whole  # labelled and unlabelled, no padding
    eval_seconds: float
    peak_bytes: Whole  # allocated on the device; on the CPU, the growth of the process's resident memory
    predicted_peak_bytes: Whole | None = None  # allocated by tensors, as planned before the start; None: not planned
    pack_size: Whole = 1  # arms that shared the passes, and the peak; the seconds are this arm's even share
    train_losses: list[float] = []  # nats a label, one for each step


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


class SplitSummary(Record):
    """What a split holds after tokenising."""

    items: Whole
    tokens: Whole
    label_tokens: Whole
    truncated: Whole  # items cut to the length limit
    dropped: Whole  # items left without a label token


class DataSummary(Record):
    """What was understood of the data."""

    form: Literal["text", "prompt_completion", "messages", "classification", "own"]  # own: known to its trainer alone
    splits: dict[str, SplitSummary]
    splits_given: bool
    duplicates_across_splits: Whole
    classes: list[str] | None = None
    unreadable: Whole = 0  # rows left out: half characters, which no tokenizer takes
    control_characters: Whole = 0  # items that hold them; they are kept


class RunStarted(Record):
    """The first line of a journal: all that the trials share."""

    type: Literal["run_started"] = "run_started"
    schema_version: Whole = SCHEMA_VERSION
    rightrank_version: str
    fingerprint: str
    settings: dict[str, JsonValue]
    environment: dict[str, str]
    data: DataSummary
    evaluation_items: list[str]  # content hashes, in the order of every item list
    metric: str
    higher_is_better: bool
    started_at: str


class TestEvaluated(Record):
    """A finished trial's number on the split that selection never saw."""

    __test__ = False  # not a test, whatever pytest thinks of the name

    type: Literal["test_evaluated"] = "test_evaluated"
    schema_version: Whole = SCHEMA_VERSION
    trial_id: str
    rank: Whole
    value: float
    item_losses: list[float]
    item_tokens: list[Whole]
    item_correct: list[Whole] | None = None


class Sample(Record):
    """A held-out item and what the model writes for it before and after training."""

    type: Literal["sample"] = "sample"
    schema_version: Whole = SCHEMA_VERSION
    trial_id: str
    item_id: str
    prompt: str
    expected: str
    before: str
    after: str


class Certified(Record):
    """An arm trained again alone, and how far that is from what it was in its pack. Differences are relative."""

    type: Literal["certified"] = "certified"
    schema_version: Whole = SCHEMA_VERSION
    trial_id: str
    rank: Whole
    pack_size: Whole
    steps: Whole
    first_step_difference: float  # of the training loss
    loss_difference: float  # of the training loss, the largest over all steps
    adapter_difference: float  # of the adapter's tensors when it has finished, in norm
    value_difference: float  # of the held-out value, absolute
    seed_difference: float | None  # between two seeds of one rank and rate, absolute; None: one seed
    exact: bool  # the model is in float32
    passed: bool | None  # None: not in float32 and no second seed to compare with

    def sentence(self) -> str:
        """For a person."""
        where = f"in a pack of {self.pack_size}" if self.pack_size > 1 else "alone"
        yardstick = "" if self.seed_difference is None else f" (two seeds differ by {self.seed_difference:.2g})"
        verdict = {True: "the same", False: "NOT the same", None: "no second seed to compare with"}[self.passed]
        return (
            f"Rank {self.rank} was trained {where}, and again alone: {verdict}. Relative differences: "
            f"{self.first_step_difference:.1e} in the first step's loss, {self.loss_difference:.1e} at most in "
            f"{self.steps} steps, {self.adapter_difference:.1e} in the adapter; held-out {self.value_difference:.1e}{yardstick}."
        )


class RankEvidence(Record):
    """What is known of one rank."""

    rank: Whole
    value: float
    low: float
    high: float
    difference: float | None = None  # worse than the reference by this much, in the metric's unit
    difference_low: float | None = None  # 95% lower bound of it, one-sided
    difference_high: float | None = None  # 95% upper bound of it, one-sided
    non_inferior: bool | None = None  # within the margin: shown, refuted, or open (None)
    learning_rate: float | None = None
    seeds: Whole = 1
    trial_ids: list[str] = []
    winner_gap: float = 0.0  # how optimistic the best of its rates is; taken out of the difference


class StaircaseStep(Record):
    """From this margin on, this rank is enough."""

    margin: float
    rank: Whole


class FittedPoint(Record):
    """The fitted curve at one rank, with its 95% interval."""

    rank: float
    value: float
    low: float
    high: float


class CurveFit(Record):
    """The curve through the ranks, in the metric's unit and direction. Intervals are 95%, by bootstrap."""

    form: Literal["power", "constant", "monotone", "u_shaped"]  # the one that predicts best
    a: float  # of the power law value(r) = a + b·r^-c, whatever the form
    b: float
    c: float
    prediction_error: dict[str, float]  # of each form: mean absolute error at a rank left out
    points: list[FittedPoint]  # from the lowest rank to the highest, to be drawn
    r_margin: float  # the rank where the curve comes within the margin of its best
    r_margin_low: float
    r_margin_high: float
    diminishing_rank: float | None  # beyond it a doubling gains less than the margin
    next_doubling_gain: float  # expected from the top rank to its double
    gain_to_come: float  # expected above the top rank, all of it
    gain_to_come_low: float
    gain_to_come_high: float


class NextRun(Record):
    """A run that would settle or extend the answer."""

    action: Literal["seeds", "items", "rank", "rates", "steps", "test", "data", "none"]
    ranks: list[Whole] = []
    learning_rates: list[float] = []
    seeds: Whole | None = None  # in all, at each of the ranks
    items: Whole | None = None  # held-out items in all
    steps: Whole | None = None
    trials: Whole = 0  # new trainings
    seconds: float | None = None  # estimated from the trials so far, where they say how long they took
    sentence: str


class HorizonNote(Record):
    """Whether the ranks' order had settled when the training ended."""

    steps: Whole
    holds_from: Whole  # the earliest evaluation from which on the same rank was the answer
    gap_growth: float | None  # of the chosen rank's gap to the reference, over the last stretch, metric's unit


class Decision(Record):
    """The answer and its evidence."""

    def to_pandas(self) -> DataFrame:
        """The evidence by rank, one row each."""
        from pandas import DataFrame

        return DataFrame([evidence.model_dump() for evidence in self.ranks]).set_index("rank")

    rank: Whole | None  # None where the evidence names none
    fallback_rank: Whole  # the smallest rank shown to be enough: what is handed over when `rank` is None
    verdict: Verdict
    flags: list[str]
    sentence: str  # for a person
    next_run: str  # what would settle or extend it
    metric: str
    higher_is_better: bool
    margin: float
    reference_rank: Whole
    confidence: float
    learning_rate: float | None
    staircase: list[StaircaseStep]
    ranks: list[RankEvidence]
    basis: Basis = "items"  # what the intervals rest on
    basis_note: str = ""  # what they cover, and what not
    next_runs: list[NextRun] = []  # the first is the cheapest that is expected to settle it
    curve: CurveFit | None = None  # from three ranks on
    winner_gap: float = 0.0  # the largest of the ranks compared, metric's unit
    horizon: HorizonNote | None = None  # where evaluations along the training were given


class Result(Record):
    """One finished training of a table that others made; `value` is None where it ended without a result."""

    trial_id: str
    rank: Whole
    learning_rate: float = 0.0  # 0: not stated
    seed: Whole = 0
    value: float | None
    item_values: list[float] = []  # in the order of the table's items; each a mean over the item's tokens
    item_weights: list[float] = []  # tokens of each item; empty: all alike
    std: float | None = None  # stated standard deviation over seeds
    std_seeds: Whole = 1  # how many seeds the value is the mean of
    train_value: float | None = None
    seconds: float | None = None
    steps: Whole | None = None
    points: list[tuple[Whole, float]] = []  # (step, value) along the training
    others: dict[str, float] = {}


class Results(Record):
    """A table of finished trainings, and what was understood of it."""

    metric: str
    higher_is_better: bool
    results: list[Result]
    understood: list[str]  # for a person: which column was taken for what, and what was left out


class SweepRow(Record):
    """One further setting (an alpha, a scaling rule, an initialisation) at one rank, at its own best rate."""

    setting: str
    rank: Whole
    learning_rate: float
    value: float  # held-out, the mean over seeds
    gain: float  # over the setting that all ranks shared, at the same rank; above 0 is better


class Decided(Record):
    """A decision in the journal, with what was handed over."""

    type: Literal["decided"] = "decided"
    schema_version: Whole = SCHEMA_VERSION
    decision: Decision
    adapter_trial_id: str | None


JournalRecord: TypeAlias = Annotated[
    RunStarted
    | TrialStarted
    | TrialFinished
    | TrialDiverged
    | TrialFailed
    | TestEvaluated
    | Sample
    | Certified
    | Decided,
    Field(discriminator="type"),
]
JOURNAL_RECORD: TypeAdapter[JournalRecord] = TypeAdapter(JournalRecord)


class StepDone(Record):
    """Progress of a running trial; shown, never journalled."""

    trial_id: str
    step: Whole
    steps: Whole
    loss: float
    seconds: float  # since the trial began


class Preparing(Record):
    """Progress of the work that comes before the first training: the frozen layers, once for each item."""

    items: Whole
    of_items: Whole
    seconds: float


RunEvent: TypeAlias = Preparing | StepDone | TrialStarted | TrialFinished | TrialDiverged | TrialFailed | Decided


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
    points: list[EvalPoint] = []  # held-out values on the way
    trainable_parameters: Whole = 0
    train_tokens: Whole = 0
    train_seconds: float | None = None  # None: the whole call
    eval_seconds: float = 0.0
    peak_bytes: Whole = 0
