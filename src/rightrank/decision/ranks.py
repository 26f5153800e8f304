"""Compare every rank with the reference at one margin, choose the smallest rank with the requested probability, and name the verdict.

The verdict is the first row that applies, from the most sobering to the plainest:

    ===========  =====================================================================================
    no_gain      the base model is within the margin of the best adapter, or the adapter is not shown to be better
                 than it (for one number per rank: within the margin of a table without a base)
    undecided    no rank has the requested probability; or a rank above the reference is clearly worse than
                 it without a reason (`find_unexplained_rank`)
    overfitting  the largest rank is worse than the margin allows on held-out data and better in training
    flat         the smallest rank is chosen, and no rank is shown to be worse than the margin allows
    rising       the largest rank is chosen, and every smaller one is shown to be worse than the margin allows
    saturated    otherwise
    ===========  =====================================================================================

"Shown" means by the 95% bounds or with the requested probability. If the values have no uncertainty (`Evidence.lacks_uncertainty`),
nothing is undecided for lack of evidence: ranks are compared by their values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from rightrank.decision.comparison import CONFIDENCE, Estimate, compute_bounds, is_within, list_lower_ranks
from rightrank.decision.evidence import Evidence
from rightrank.decision.table import Contender, MetricUnit
from rightrank.schema.results import StaircaseStep, Verdict

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
    probability: float | None  # that it is enough; None if the evidence gives none


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

    def list_indistinguishable_ranks(self) -> list[int]:
        """List the ranks that are not shown to be worse than the margin allows, by their bounds and with a probability of `CONFIDENCE`."""
        return [
            rank
            for rank in self.ranks
            if self.by_rank[rank].non_inferior is not False or (self.by_rank[rank].probability or 0.0) > 1 - CONFIDENCE
            if self.confidence is not None
        ]

    @property
    def is_open(self) -> bool:
        """Return whether no rank has the requested probability."""
        return self.confidence is not None and (self.by_rank[self.chosen].probability or 0.0) < self.confidence

    @property
    def is_base_enough(self) -> bool:
        """Return whether the base is within the margin, or the reference is not shown to be better than it."""
        if 0 not in self.by_rank:
            return False
        base = self.by_rank[0]
        if self.confidence is None:
            return base.is_enough or is_within(base.difference.mean, self.evidence.margin_without_base)
        return (base.probability or 0.0) >= self.confidence or base.low <= 0

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
        return (self.by_rank[0 if verdict == "no_gain" else self.chosen].probability or 0.0) >= CONFIDENCE

    @property
    def next_lower_rank(self) -> int | None:
        """Return the highest rank below the chosen one."""
        return max((rank for rank in self.ranks if rank < self.chosen), default=None)

    def is_worse(self, rank: int) -> bool:
        """Return whether the rank is shown to be worse than the margin allows, or probably is.

        For values without uncertainty, the values decide.
        """
        compared = self.by_rank[rank]
        if self.confidence is None:
            return not compared.is_enough
        return compared.non_inferior is False or (compared.probability or 0.0) <= 1 - self.confidence

    def is_clearly_worse(self, rank: int) -> bool:
        """Return whether the rank is worse (`is_worse`) with a probability of `CONFIDENCE`, if there are probabilities."""
        compared = self.by_rank[rank]
        return self.is_worse(rank) and (
            (compared.probability or 0.0) <= 1 - CONFIDENCE or compared.non_inferior is False
        )


def compare_ranks(evidence: Evidence, margin: float, confidence: float = DEFAULT_CONFIDENCE) -> Comparison:
    """Compare every rank, and the base model if the table has it, and choose a rank.

    The choice is the smallest rank whose probability is at least `confidence`, else the likeliest. For values without uncertainty it is
    the smallest rank that a walk down from the reference reaches.
    """
    contenders = ([evidence.base] if evidence.base else []) + list(evidence.contenders.values())
    by_rank = {contender.rank: _compare_rank(contender, evidence, margin) for contender in contenders}
    if evidence.lacks_uncertainty:
        return Comparison(evidence, by_rank, margin, evidence.pick_by_values(margin), None)
    likely = {rank: by_rank[rank].probability or 0.0 for rank in sorted(evidence.contenders)}
    sufficient_ranks = [rank for rank in likely if likely[rank] >= confidence]
    chosen = min(sufficient_ranks, default=max(likely, key=lambda rank: (likely[rank], -rank)))
    return Comparison(evidence, by_rank, margin, chosen, confidence)


def _compare_rank(contender: Contender, evidence: Evidence, margin: float) -> RankComparison:
    mean, probability = evidence.estimate_value(contender), evidence.compute_probability(contender.rank, margin)
    if contender.rank == evidence.reference.rank:
        return RankComparison(contender, mean, ZERO_DIFFERENCE, 0.0, 0.0, True, True, probability)
    difference = evidence.estimate_difference(contender)
    bounds = compute_bounds(difference)
    low = bounds.low - min(evidence.selection_bias, difference.standard_error)  # what the rank's own noise can explain
    bounds = replace(bounds, low=low)
    is_enough = is_within(bounds.mean, margin)
    non_inferior = None if evidence.basis == "values" else bounds.is_enough(margin)
    return RankComparison(contender, mean, difference, low, bounds.high, is_enough, non_inferior, probability)


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


FALL_IN_MARGINS = 20.0  # below the best: no published curve has a single fall above 16 (benchmarks/decide)
RISE = 1 / 8  # the share of a rank's difference that its neighbor has if results get worse rank by rank


def determine_verdict(comparison: Comparison) -> Verdict:
    """Return the first row of the table above that applies."""
    if comparison.is_base_enough:
        return "no_gain"
    if comparison.is_open or find_unexplained_rank(comparison) is not None:
        return "undecided"
    if is_overfitting(comparison):
        return "overfitting"
    if comparison.chosen == comparison.ranks[0] and not any(comparison.is_worse(rank) for rank in comparison.ranks):
        return "flat"
    if is_rising(comparison) and all(comparison.is_worse(rank) for rank in comparison.ranks[:-1]):
        return "rising"
    return "saturated"


def find_unexplained_rank(comparison: Comparison) -> int | None:
    """Find the smallest rank above the reference that is clearly worse without a reason, or return None.

    A larger rank is expected to be about as good. If it is not, its training may have failed (a learning rate that is too high, an
    unlucky seed), and it may truly be the best: on twelve long grids most answers next to such a rank were too small
    (benchmarks/selection/noise_model.json). Overfitting is another reason: then its training values are better than the reference's,
    or results get worse rank by rank. Two seeds whose bounds show it settle it too, unless it fell by `FALL_IN_MARGINS` at the lowest
    of its learning rates. With one number a rank it has to fall as far.
    """
    larger = [rank for rank in comparison.ranks if rank > comparison.reference.rank]
    for rank in larger:
        compared = comparison.by_rank[rank]
        has_failed = not comparison.evidence.has_lower_rate(rank) and not is_within(
            compared.difference.mean, FALL_IN_MARGINS * comparison.margin
        )
        is_shown = compared.non_inferior is False and compared.difference.seeds > 1
        is_settled = (comparison.evidence.lacks_uncertainty or is_shown) and not has_failed
        is_explained = _has_better_training(comparison, rank) or _is_gradual_rise(comparison, larger, rank)
        if comparison.is_clearly_worse(rank) and not is_settled and not is_explained:
            return rank
    return None


def _is_gradual_rise(comparison: Comparison, larger: Sequence[int], rank: int) -> bool:
    """Return whether the neighboring larger ranks are worse too, as with overfitting.

    The neighbor below must have a share of this rank's difference, the one above more than this rank. False if the base model is
    better than this rank.
    """
    differences = {other_rank: comparison.by_rank[other_rank].difference.mean for other_rank in comparison.by_rank}
    if 0 in differences and differences[rank] > differences[0]:
        return False
    index = larger.index(rank)
    below, above = larger[max(index - 1, 0) : index], larger[index + 1 : index + 2]
    return any(differences[other_rank] >= RISE * differences[rank] for other_rank in below) or any(
        differences[other_rank] >= (1 + RISE) * differences[rank] for other_rank in above
    )


def is_rising(comparison: Comparison) -> bool:
    """Return whether the top rank is better than every smaller one by more than the margin and its stated deviation."""
    *smaller, top = comparison.ranks
    if comparison.reference.rank != top:
        return False
    stated_deviations = [cell.deviation or 0.0 for cell in comparison.reference.cells.values()]
    threshold = max(comparison.margin, *stated_deviations) if comparison.evidence.basis == "std" else comparison.margin
    return all(not is_within(comparison.by_rank[rank].difference.mean, threshold) for rank in smaller)


def is_overfitting(comparison: Comparison) -> bool:
    """Return whether the largest rank is worse than the margin allows on held-out data but better in training."""
    top = comparison.ranks[-1]
    return top != comparison.reference.rank and comparison.is_worse(top) and _has_better_training(comparison, top)


def _has_better_training(comparison: Comparison, rank: int) -> bool:
    """Return whether the rank is better than the reference in training."""
    rank_value, reference_value = (
        _compute_train_value(comparison.evidence.contenders[rank]),
        _compute_train_value(comparison.reference),
    )
    return rank_value is not None and reference_value is not None and rank_value < reference_value


def _compute_train_value(contender: Contender) -> float | None:
    """Return the mean training loss. Lower is better for every metric."""
    values = [cell.train_value for cell in contender.cells.values() if cell.train_value is not None]
    return float(np.mean(values)) if values else None


def collect_flags(
    comparison: Comparison,
    verdict: Verdict,
) -> list[str]:
    """Return the flags in a fixed order. Each has an entry in docs/reference/decision.md."""
    evidence, top = comparison.evidence, comparison.ranks[-1]
    answer = {comparison.chosen, comparison.reference.rank}
    flags = {
        "underpowered": is_underpowered(comparison, verdict),
        "rising": verdict == "undecided"
        and is_rising(comparison)
        and all(comparison.by_rank[rank].low > 0 for rank in comparison.ranks if rank < top),
        "lr_edge": any(evidence.is_at_edge(rank) for rank in answer),
        "unstable": any(evidence.table.missing.values()),
        "outlier": bool(evidence.outliers),
        "larger_rank_worse": find_unexplained_rank(comparison) is not None,
        "unequal_length": len(evidence.list_lengths()) > 1,
        "one_seed": comparison.is_indication,
        "selection_bias": evidence.selection_bias > comparison.margin / 2,
    }
    return [flag for flag, is_raised in flags.items() if is_raised]


def is_underpowered(comparison: Comparison, verdict: Verdict) -> bool:
    """Return whether the data can't show the answer at 95% confidence."""
    if not comparison.evidence.lacks_uncertainty:
        return verdict == "undecided"
    compared, below = comparison.by_rank, comparison.next_lower_rank
    is_settled = compared[comparison.chosen].non_inferior is True and (
        below is None or compared[below].non_inferior is False
    )
    return comparison.evidence.basis == "values" or not is_settled


def format_rank_names(ranks: Sequence[int]) -> str:
    """Format ranks as `rank 4` or `ranks 4, 16 and 64`."""
    *first, last = map(str, ranks)
    return f"ranks {', '.join(first)} and {last}" if first else f"rank {last}"
