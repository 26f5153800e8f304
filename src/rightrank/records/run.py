"""What a run folder keeps in its journal, and the events that whoever looks on is told."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, JsonValue, TypeAdapter, field_validator

from rightrank.records.adapter import AdapterAnswer, HandedOver
from rightrank.records.base import MAX_WHOLE, SCHEMA_VERSION, Record, Whole
from rightrank.records.decision import Decision
from rightrank.records.trials import ADAPTERS_PER_PASS, TrialDiverged, TrialFailed, TrialFinished, TrialStarted


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
    points_metric: str | None = None  # of the evaluations along a training, where it is not the one that decides
    started_at: str

    @field_validator("settings")
    @classmethod
    def _numbers_exact(cls, settings: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if any(isinstance(value, int) and abs(value) > MAX_WHOLE for value in settings.values()):
            raise ValueError(f"a setting is a number beyond {MAX_WHOLE}")
        return settings


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
    metrics: dict[str, float] = Field(default_factory=dict)  # every metric measured there
    metric: str | None = None  # of `value`, where it is not the decision's: a task has no split of its own


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
    adapters_per_pass: Whole = Field(validation_alias=ADAPTERS_PER_PASS)
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
        where = f"in a pack of {self.adapters_per_pass}" if self.adapters_per_pass > 1 else "alone"
        yardstick = "" if self.seed_difference is None else f" (two seeds differ by {self.seed_difference:.2g})"
        verdict = {True: "the same", False: "NOT the same", None: "no second seed to compare with"}[self.passed]
        return (
            f"Rank {self.rank} was trained {where}, and again alone: {verdict}. Relative differences: "
            f"{self.first_step_difference:.1e} in the first step's loss, {self.loss_difference:.1e} at most in "
            f"{self.steps} steps, {self.adapter_difference:.1e} in the adapter; held-out {self.value_difference:.1e}{yardstick}."
        )


class AdapterRecorded(Record):
    """The answer to the first question, and what `adapter/` holds from then on."""

    type: Literal["adapter_recorded"] = "adapter_recorded"
    schema_version: Whole = SCHEMA_VERSION
    answer: AdapterAnswer
    handed_over: HandedOver
    trainings: float  # cost up to the answer, in whole trainings


class DecisionRecorded(Record):
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
    | AdapterRecorded
    | DecisionRecorded,
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


RunEvent: TypeAlias = (
    Preparing | StepDone | TrialStarted | TrialFinished | TrialDiverged | TrialFailed | DecisionRecorded
)
