"""What a selection will do and what it can show, before any training: `select --dry-run`."""

from __future__ import annotations

from pydantic import Field

from rightrank.records.base import Record, Whole
from rightrank.records.run import SplitSummary


class PreflightRank(Record):
    """One rank and its memory; None where the model can't be planned or the memory is unknown."""

    rank: Whole
    peak_bytes: Whole | None  # of tensors
    needed_bytes: Whole | None  # with segments, process and headroom
    fits: bool | None


class PreflightStrategy(Record):
    """The cost of one strategy, in whole trainings and in seconds."""

    strategy: str
    trainings: float  # expected
    trainings_at_most: float
    trainings_to_adapter: float  # expected, until the first question is answered
    seconds: float | None  # None: this device is not calibrated (`rightrank plan --calibrate`)
    seconds_at_most: float | None
    price: float | None  # None: no price per hour was given


class PreflightCost(PreflightStrategy):
    """The cost of the strategy of the settings, and of the others beside it."""

    steps: Whole  # optimizer steps of a training
    strategies: list[PreflightStrategy]


class Preflight(Record):
    """A selection before its first training."""

    metric: str
    margin: float | None  # None: 1% of a value that is not known yet
    goal: str
    form: str
    splits: dict[str, SplitSummary]  # train, validation, test
    splits_given: bool
    left_out: list[str]  # what was left out or truncated, with its number and why
    longest: Whole  # tokens of the longest example
    seq_len: Whole
    ranks: list[PreflightRank]
    memory_bytes: Whole | None
    cost: PreflightCost
    seeds: Whole
    expected_half_width: float | None  # one-sided 95%, of the widest rank's difference from the top, metric's unit
    undecided_below_margin: float | None  # a rank that equals the top is not expected to be shown enough below it
    cures: list[str]  # where the margin is below: examples, seeds or margin that would settle it
    notes: list[str] = Field(default_factory=list)
