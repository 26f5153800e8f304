"""Every rank against the reference: its paired difference, its bounds, and whether it is enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile

from rightrank.decision.evidence import Evidence
from rightrank.decision.intervals import Estimate
from rightrank.decision.metrics import MetricKind
from rightrank.decision.table import Contender
from rightrank.schema.decision import StaircaseStep

CONFIDENCE = 0.95  # with which a rank is shown to be enough
REFUTED = 0.95  # with which it is shown not to be; in between it is inconclusive
MAX_EXPONENT = 100.0  # keeps the bound of a perplexity finite
TIE = 1e-9  # of the margin: a difference that exceeds it by rounding alone is within it


@dataclass(frozen=True, slots=True)
class Unit:
    """Conversion from the oriented unit (lower is better, nats for a perplexity) to the metric's unit."""

    kind: MetricKind
    higher_is_better: bool
    reference: float  # the reference's value in the metric's unit

    def value(self, oriented: float) -> float:
        if self.kind == "perplexity":
            return math.exp(min(oriented, MAX_EXPONENT))
        return -oriented if self.higher_is_better else oriented

    def difference(self, oriented: float) -> float:
        """How much worse than the reference, in the metric's unit."""
        return self.reference * math.expm1(min(oriented, MAX_EXPONENT)) if self.kind == "perplexity" else oriented

    def oriented_margin(self, margin: float) -> float:
        return math.log1p(margin / self.reference) if self.kind == "perplexity" else margin


@dataclass(frozen=True, slots=True)
class Judged:
    """One rank against the reference, in the oriented unit."""

    contender: Contender
    mean: Estimate
    difference: Estimate
    low: float  # one-sided 95% bounds of the difference; the lower one is corrected for the reference's winner's curse
    high: float
    further: Estimate | None  # the difference that a further seed would show; None where seed noise was not measured
    within: bool  # taken as enough: shown by the upper bound, or by the mean alone in a point reading
    non_inferior: bool | None  # True: shown to be enough; False: shown not to be; None: inconclusive
    threshold: float  # the smallest margin at which the rank is taken as enough


@dataclass(frozen=True, slots=True)
class Comparison:
    """All ranks against the reference at one margin, and the rank that the rule chooses."""

    evidence: Evidence
    judged: dict[int, Judged]  # by rank; the base is rank 0
    margin: float  # oriented unit
    chosen: int

    @property
    def reference(self) -> Contender:
        return self.evidence.reference

    @property
    def ranks(self) -> list[int]:
        """The ranks tried, ascending, without the base."""
        return sorted(self.evidence.contenders)

    @property
    def is_indication(self) -> bool:
        """Whether a rank that the answer rests on was compared with the reference on fewer than two seeds."""
        if self.evidence.basis == "std":
            return False  # the table states the noise over seeds
        if self.chosen == self.reference.rank and len(self.reference.cells) < 2:
            return True
        answer = {self.chosen, self.next_lower or self.chosen} - {self.reference.rank}
        return any(self.judged[rank].difference.seeds < 2 for rank in answer)

    @property
    def next_lower(self) -> int | None:
        """The highest rank below the chosen one."""
        return max((rank for rank in self.ranks if rank < self.chosen), default=None)


def compare(evidence: Evidence, margin: float) -> Comparison:
    """Judge every rank, and the base if the table has it, and walk down from the reference."""
    everyone = ([evidence.base] if evidence.base else []) + list(evidence.contenders.values())
    judged = {contender.rank: _judge(contender, evidence, margin) for contender in everyone}
    return Comparison(evidence, judged, margin, walk_down(judged, evidence.reference.rank, lambda r: judged[r].within))


def _judge(contender: Contender, evidence: Evidence, margin: float) -> Judged:
    mean = evidence.value(contender)
    if contender.rank == evidence.reference.rank:
        zero = Estimate(0.0, 0.0, 0.0, 0.0, 0, 1, 0.0, 0.0)
        return Judged(contender, mean, zero, 0.0, 0.0, None, True, True, 0.0)
    difference = evidence.difference(contender)
    gap = evidence.reference_gap
    low, high = difference.bound(1 - CONFIDENCE) - gap, difference.bound(CONFIDENCE)
    refuted = difference.probability_below(margin + gap) < 1 - REFUTED
    shown = None if evidence.basis == "values" else True if high < margin else False if refuted else None
    further = difference.of_a_further_seed() if evidence.prior is not None and contender.rank > 0 else None
    threshold = max(difference.mean if evidence.is_point_reading else high, 0.0)
    within = difference.mean <= margin * (1 + TIE) + 1e-12 if evidence.is_point_reading else high < margin
    return Judged(contender, mean, difference, low, high, further, within, shown, threshold)


def walk_down(ranks: Iterable[int], reference: int, holds: Callable[[int], bool]) -> int:
    """The smallest of `ranks` above 0 that the walk from `reference` downward reaches before the first that fails.

    This is a fixed-sequence test: no rank below a failure is tested, and so no correction for multiplicity is needed.
    """
    return min(takewhile(holds, descending(ranks, reference)), default=reference)


def descending(ranks: Iterable[int], reference: int) -> list[int]:
    """The ranks between 0 and `reference`, both excluded, from the top downward."""
    return sorted((rank for rank in ranks if 0 < rank < reference), reverse=True)


def staircase(found: Comparison, unit: Unit) -> list[StaircaseStep]:
    """The chosen rank as a step function of the margin: a step at each margin from which the walk reaches a smaller rank."""
    steps = [StaircaseStep(margin=0.0, rank=found.reference.rank)]
    threshold = 0.0
    for rank in descending(found.judged, found.reference.rank):
        threshold = max(threshold, found.judged[rank].threshold)
        margin = unit.difference(threshold)
        if margin == steps[-1].margin:
            steps.pop()  # the smaller rank replaces a larger one at the same margin
        steps.append(StaircaseStep(margin=margin, rank=rank))
    return steps
