"""The comparison of two adapters (or models) on the same examples."""

from __future__ import annotations

from typing import Literal, TypeAlias

from rightrank.records.base import Record, Whole

ComparisonVerdict: TypeAlias = Literal["not_worse", "worse", "cannot_tell"]


class MetricComparison(Record):
    """B against A by one metric on one data set."""

    data: str
    metric: str
    verdict: ComparisonVerdict
    value_a: float
    value_b: float
    difference: float  # B is worse by this much, metric's unit; below 0: better
    difference_low: float  # 95% lower bound of it, one-sided
    difference_high: float  # 95% upper bound of it, one-sided
    margin: float
    examples: Whole
    # about how many would show "not worse" at this difference; None: none would, or it is shown
    examples_needed: Whole | None


class AdapterComparison(Record):
    """Whether B is no worse than A. The figures at the top are those of the comparison with the worst verdict."""

    verdict: ComparisonVerdict
    sentence: str
    metric: str
    margin: float
    difference: float
    difference_low: float
    difference_high: float
    examples: Whole
    examples_needed: Whole | None
    comparisons: list[MetricComparison]
