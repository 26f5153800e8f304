"""The answer to the first question: the smallest adapter that loses nothing, and what is handed over."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from rightrank.records.base import Record, Whole

AdapterOrigin: TypeAlias = Literal["trained", "truncated", "recovered"]


class AdapterCandidate(Record):
    """One adapter file against the reference file, on the same validation examples."""

    rank: Whole
    how: AdapterOrigin
    trial_id: str
    value: float  # held-out, metric's unit and direction
    difference: float  # worse than the reference by this much, metric's unit
    difference_low: float | None = None  # its 95% lower bound, one-sided, over examples; None without example scores
    difference_high: float | None  # its 95% upper bound, the one that is tested
    holds: bool  # the bound is below the margin


class AdapterAnswer(Record):
    """The smallest adapter of one training at the top rank that is not worse than the reference by more than the margin.

    The reference is the better of the top as trained and the top with the extra steps that recovered candidates got.
    """

    rank: Whole
    how: AdapterOrigin
    trial_id: str
    trained_rank: Whole
    trained_id: str  # the training at the top rank that every candidate comes from
    reference_id: str
    reference_how: AdapterOrigin
    extra_steps_difference: float | None  # the top with the extra steps minus the top as trained; None: not measured
    difference: float  # of the chosen adapter from the reference; 0 where it is the reference
    difference_high: float | None
    margin: float
    candidates: list[AdapterCandidate]  # by descending rank
    sentence: str
    notes: list[str] = Field(default_factory=list)  # what else a person should know, each with what to do


class TrainingRankEstimate(Record):
    """Where the training rank probably lies, by the first question's evidence. It is no evidence for that rank."""

    low: Whole
    high: Whole
    trainings: float  # expected, to answer the second question from here
    sentence: str


class HandedOver(Record):
    """What `adapter/` holds. Differences are from the reference adapter, in the metric's unit; above 0 is worse."""

    rank: Whole
    max_module_rank: Whole
    how: AdapterOrigin
    trained_rank: Whole
    reference_adapter: str  # a folder that PEFT loads, relative to the run
    difference: float
    difference_high: float | None
    test_difference: float | None  # None without a test split
    test_difference_high: float | None
