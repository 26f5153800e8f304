"""The guard against forgetting: data whose loss must not get worse than the base's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rightrank.records.adapter import AdapterOrigin
from rightrank.records.base import SCHEMA_VERSION, Record, Whole
from rightrank.records.decision import NextRun


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
