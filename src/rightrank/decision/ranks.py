"""Compare every rank with the reference at one margin, and choose the smallest rank with the requested probability."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from rightrank.decision.comparison import CONFIDENCE, Bounds, Estimate, is_within, list_lower_ranks
from rightrank.decision.evidence import Evidence
from rightrank.decision.table import Contender, MetricUnit
from rightrank.schema.decision import StaircaseStep, Verdict

# With it, two seeds answer 80% of the cases of twenty grids: `benchmarks/decide/probability.py`.
DEFAULT_CONFIDENCE = 0.6
ZERO_DIFFERENCE = Estimate(0.0, 0.0, 0.0, 0.0, 0, 1, 0.0, 0.0)  # the difference of the reference from itself


@dataclass(frozen=True, slots=True)
class RankComparison:
    """The comparison of one rank with the reference, in the oriented unit."""

    contender: Contender
    mean: Estimate
    difference: Estimate
    low: float  # one-sided 95% bounds of the difference; the lower one is corrected for the reference's selection bias
    high: float
    is_enough: bool  # whether the mean is within the margin
    non_inferior: bool | None  # True: shown to be enough; False: shown not to be; None: inconclusive


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of all ranks with the reference at one margin, and the rank that the rule chooses."""

    evidence: Evidence
    by_rank: dict[int, RankComparison]  # the base model is rank 0
    margin: float  # oriented unit
    chosen: int
    confidence: float | None  # the requested probability; None if the values have no uncertainty

    @property
    def reference(self) -> Contender:
        return self.evidence.reference

    @property
    def ranks(self) -> list[int]:
        """Return the ranks that were trained, ascending, without the base model."""
        return sorted(self.evidence.contenders)

    def compute_probability(self, rank: int) -> float | None:
        """Compute the probability that the rank is enough, or return None if the evidence gives none."""
        return self.evidence.compute_probability(rank, self.margin)

    def require_probability(self, rank: int) -> float:
        """Return the probability that the rank is enough. The evidence must give one."""
        probability = self.compute_probability(rank)
        assert probability is not None
        return probability

    @property
    def is_open(self) -> bool:
        """Return whether no rank has the requested probability."""
        return self.confidence is not None and self.require_probability(self.chosen) < self.confidence

    @property
    def is_base_enough(self) -> bool:
        """Return whether the base is within the margin, or the reference is not shown to be better than it."""
        if 0 not in self.by_rank:
            return False
        base = self.by_rank[0]
        if self.confidence is None:
            return base.is_enough or is_within(base.difference.mean, self.evidence.margin_without_base)
        return self.require_probability(0) >= self.confidence or base.low <= 0

    @property
    def is_indication(self) -> bool:
        """Return whether a rank that the answer rests on was compared with the reference on fewer than two seeds."""
        if self.evidence.basis == "std":
            return False  # the table states the noise over seeds
        if self.chosen == self.reference.rank and len(self.reference.cells) < 2:
            return True
        answer = {self.chosen, self.next_lower_rank or self.chosen} - {self.reference.rank}
        return any(self.by_rank[rank].difference.seeds < 2 for rank in answer)

    def is_sure(self, verdict: Verdict) -> bool:
        """Return whether two seeds or more give the answer a probability of `CONFIDENCE`, or show that results still rise."""
        if self.is_indication:
            return False
        if verdict == "rising":
            return all(self.by_rank[rank].non_inferior is False for rank in self.ranks if rank < self.chosen)
        return (self.compute_probability(0 if verdict == "no_gain" else self.chosen) or 0.0) >= CONFIDENCE

    @property
    def next_lower_rank(self) -> int | None:
        """Return the highest rank below the chosen one."""
        return max((rank for rank in self.ranks if rank < self.chosen), default=None)

    def is_worse(self, rank: int) -> bool:
        """Return whether the rank is shown to be worse than the margin allows, or probably is.

        For values without uncertainty, the values decide.
        """
        compared = self.by_rank[rank]
        if self.confidence is not None and self.require_probability(rank) <= 1 - self.confidence:
            return True
        return compared.non_inferior is False if self.confidence is not None else not compared.is_enough

    def is_clearly_worse(self, rank: int) -> bool:
        """Return whether the rank is worse (`is_worse`) with a probability of `CONFIDENCE`, if there are probabilities."""
        is_likely = self.confidence is not None and self.require_probability(rank) > 1 - CONFIDENCE
        return self.is_worse(rank) and not (is_likely and self.by_rank[rank].non_inferior is not False)


def compare_ranks(evidence: Evidence, margin: float, confidence: float = DEFAULT_CONFIDENCE) -> Comparison:
    """Compare every rank, and the base model if the table has it, and choose a rank.

    The choice is the smallest rank whose probability is at least `confidence`, else the likeliest. For values without uncertainty it is
    the smallest rank that a walk down from the reference reaches.
    """
    contenders = ([evidence.base] if evidence.base else []) + list(evidence.contenders.values())
    by_rank = {contender.rank: _compare_rank(contender, evidence, margin) for contender in contenders}
    if evidence.lacks_uncertainty:
        return Comparison(evidence, by_rank, margin, evidence.pick_by_values(margin), None)
    likely = {rank: evidence.compute_probability(rank, margin) or 0.0 for rank in sorted(evidence.contenders)}
    sufficient_ranks = [rank for rank in likely if likely[rank] >= confidence]
    chosen = min(sufficient_ranks, default=max(likely, key=lambda rank: (likely[rank], -rank)))
    return Comparison(evidence, by_rank, margin, chosen, confidence)


def _compare_rank(contender: Contender, evidence: Evidence, margin: float) -> RankComparison:
    mean = evidence.estimate_value(contender)
    if contender.rank == evidence.reference.rank:
        return RankComparison(contender, mean, ZERO_DIFFERENCE, 0.0, 0.0, True, True)
    difference = evidence.estimate_difference(contender)
    gap = min(evidence.selection_bias, difference.standard_error)  # no more than the rank's own noise can explain
    bounds = Bounds(
        difference.mean, difference.compute_bound(1 - CONFIDENCE) - gap, difference.compute_bound(CONFIDENCE)
    )
    return RankComparison(
        contender,
        mean,
        difference,
        bounds.low,
        bounds.high,
        is_within(bounds.mean, margin),
        None if evidence.basis == "values" else bounds.is_enough(margin),
    )


def build_staircase(comparison: Comparison, unit: MetricUnit) -> list[StaircaseStep]:
    """Return the chosen rank as a step function of the margin: a step at each margin from which a smaller rank is enough."""
    start = comparison.reference.rank if comparison.confidence is None else comparison.ranks[-1]
    steps = [StaircaseStep(margin=0.0, rank=start)]
    for threshold, rank in _list_thresholds(comparison):
        margin = unit.convert_difference(threshold)
        if rank >= steps[-1].rank:
            continue
        if margin == steps[-1].margin:
            steps.pop()  # the smaller rank replaces a larger one at the same margin
        steps.append(StaircaseStep(margin=margin, rank=rank))
    return steps


def _list_thresholds(comparison: Comparison) -> list[tuple[float, int]]:
    """List each rank, without the base model, with the margin from which it is enough, by ascending margin."""
    if comparison.confidence is not None:
        margins = comparison.evidence.compute_margins(comparison.confidence)
        return sorted((margin, rank) for rank, margin in margins.items())
    ranks = list_lower_ranks(comparison.by_rank, comparison.reference.rank)
    means = [max(comparison.by_rank[rank].difference.mean, 0.0) for rank in ranks]
    return list(zip(accumulate(means, max), ranks, strict=True))
