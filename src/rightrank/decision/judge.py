"""Every rank against the reference: its paired difference, its bounds, and whether it is taken as enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile

from rightrank.decision.evidence import Contender, Evidence
from rightrank.decision.metrics import MetricKind
from rightrank.maths.intervals import Estimate
from rightrank.records import StaircaseStep

CONFIDENCE = 0.95
REFUTED = 0.95  # a rank is called not enough when it is this sure; between the two it is open
LARGEST_EXPONENT = 100.0  # a perplexity's bound beyond it is without meaning, and must stay finite
TIE = 1e-9  # of the margin: a difference equal to it, but for rounding, is within it


@dataclass(frozen=True, slots=True)
class Unit:
    """From the oriented unit to the metric's own."""

    kind: MetricKind
    higher_is_better: bool
    reference: float  # the reference's value, metric's unit

    def value(self, oriented: float) -> float:
        if self.kind == "perplexity":
            return math.exp(min(oriented, LARGEST_EXPONENT))
        return -oriented if self.higher_is_better else oriented

    def difference(self, oriented: float) -> float:
        """Worse than the reference by this much."""
        return self.reference * math.expm1(min(oriented, LARGEST_EXPONENT)) if self.kind == "perplexity" else oriented

    def oriented_margin(self, margin: float) -> float:
        return math.log1p(margin / self.reference) if self.kind == "perplexity" else margin


@dataclass(frozen=True, slots=True)
class Judged:
    """One rank against the reference, oriented unit."""

    contender: Contender
    mean: Estimate
    difference: Estimate
    low: float  # one-sided bounds of the difference; the lower one without the reference's luck
    high: float
    within: bool  # taken as enough: shown, or read off where nothing can be shown
    non_inferior: bool | None
    threshold: float  # the margin from which on it is taken as enough


def judge(evidence: Evidence, margin: float) -> dict[int, Judged]:
    """Every rank against the reference, the base too if there is one."""
    everyone = ([evidence.base] if evidence.base else []) + list(evidence.contenders.values())
    return {contender.rank: _judge_one(contender, evidence, margin) for contender in everyone}


def _judge_one(contender: Contender, evidence: Evidence, margin: float) -> Judged:
    mean = evidence.value(contender)
    if contender.rank == evidence.reference.rank:
        zero = Estimate(0.0, 0.0, 0.0, 0.0, 0, 1, 0.0, 0.0)
        return Judged(contender, mean, zero, 0.0, 0.0, True, True, 0.0)
    difference = evidence.difference(contender)
    gap = evidence.reference_gap
    low, high = difference.bound(1 - CONFIDENCE) - gap, difference.bound(CONFIDENCE)
    refuted = difference.probability_below(margin + gap) < 1 - REFUTED
    shown = True if high < margin else False if refuted else None
    read_off = evidence.basis in ("std", "values")
    threshold = max(difference.mean, 0.0) if read_off else max(high, 0.0)
    within = difference.mean <= margin * (1 + TIE) + 1e-12 if read_off else high < margin
    return Judged(contender, mean, difference, low, high, within, shown, threshold)


def walk_down(ranks: Iterable[int], reference: int, holds: Callable[[int], bool]) -> int:
    """The smallest of `ranks` above 0 that the walk from `reference` downward reaches before the first that fails.

    A fixed sequence: a rank below one that fails is not tested, so that no correction for multiplicity is due.
    """
    return min(takewhile(holds, descending(ranks, reference)), default=reference)


def descending(ranks: Iterable[int], reference: int) -> list[int]:
    """The ranks between 0 and `reference`, both excluded, from the top downward."""
    return sorted((rank for rank in ranks if 0 < rank < reference), reverse=True)


def staircase(judged: dict[int, Judged], reference_rank: int, unit: Unit) -> list[StaircaseStep]:
    """Margin → rank, exactly: a step at every margin from which on a smaller rank is reached. Starts at margin 0."""
    steps = [StaircaseStep(margin=0.0, rank=reference_rank)]
    threshold = 0.0
    for rank in descending(judged, reference_rank):
        threshold = max(threshold, judged[rank].threshold)
        margin = unit.difference(threshold)
        if margin == steps[-1].margin:
            steps.pop()  # one margin, one rank: the smaller
        steps.append(StaircaseStep(margin=margin, rank=rank))
    return steps
