"""The decision rule: the smallest rank that is not worse than the best by more than the margin, with its verdict, words and next runs.

The probability of a rank is that of being within the margin of every other rank at once, each at its best learning rate, by the joint
distribution of their means (`Evidence.compute_probability`). The answer is the smallest rank whose probability is at least
`DEFAULT_CONFIDENCE`, or another confidence that the caller requests. The 95% bounds of each rank's paired difference from the reference,
the rank with the best mean, are evidence beside it. One seed gives an indication: the decision has the flag `one_seed`, and its
`confidence` is None, since bounds exclude the noise over seeds.

A table with one number per rank proves nothing (`Evidence.lacks_uncertainty`). There the rule compares the values themselves, as a careful
reader of a published table would; the decision has the flag `underpowered`, and `non_inferior` is None.

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

"Shown" means by the 95% bounds or with the requested probability. More seeds or examples are planned with the present differences, which
are themselves uncertain: a plan is no guarantee. The command of a planned run is in `schema.events`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from rightrank.decision.adapter import format_no_gain_advice, format_share
from rightrank.decision.comparison import (
    CONFIDENCE,
    MAX_SEEDS,
    TWO_SIDED,
    Estimate,
    compute_bounds,
    format_no_gain,
    is_within,
    list_lower_ranks,
)
from rightrank.decision.evidence import Evidence
from rightrank.decision.table import Contender, MetricUnit, Outlier, ScoreTable, select_checkpoint
from rightrank.schema.errors import ResultsError
from rightrank.schema.metrics import LOSS_KINDS, Checkpoint, Margin, parse_margin
from rightrank.schema.results import Basis, Decision, NextRun, RankEvidence, StaircaseStep, Verdict

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

    def is_worse(self, rank: int, confidence: float = 0.0) -> bool:
        """Return whether the rank is shown to be worse than the margin allows, or probably is.

        For values without uncertainty, the values decide.

        Args:
            confidence: the least probability of being worse, if it is above the requested one.
        """
        compared = self.by_rank[rank]
        if self.confidence is None:
            return not compared.is_enough
        is_unlikely = (compared.probability or 0.0) <= 1 - max(confidence, self.confidence)
        return compared.non_inferior is False or is_unlikely


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
        if comparison.is_worse(rank, CONFIDENCE) and not is_settled and not is_explained:
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


def decide_table(
    table: ScoreTable,
    margin: Margin | None = None,
    *,
    confidence: float = DEFAULT_CONFIDENCE,
    checkpoint: Checkpoint = "last",
) -> Decision:
    """Decide on a table.

    Args:
        margin: how much worse than the best is still enough: a number in the metric's unit, or a share of the gain over the base
            such as "2%"; None for 1%.
        confidence: choose the smallest rank that is enough with this probability.
        checkpoint: the evaluation of each training that is compared, if the table has evaluations during training.

    Raises:
        ResultsError: fewer than two ranks have a finished trial, or the margin is not above 0.
    """
    ranks = table.list_ranks()
    if len(ranks) < 2:
        raise ResultsError(
            f"{'one rank has' if ranks else 'no rank has'} a finished trial: a comparison needs two or more; train more ranks"
        )
    if not 0.5 <= confidence < 1:
        raise ResultsError(f"confidence {confidence:g} is not allowed: give a probability from 0.5 to below 1")
    try:
        requested_margin = parse_margin(margin)
    except ValueError as error:
        raise ResultsError(str(error)) from None
    table = select_checkpoint(table, checkpoint)
    evidence = Evidence(table)
    unit, margin = evidence.unit, evidence.resolve_margin(requested_margin)
    comparison = compare_ranks(evidence, unit.convert_margin(margin), confidence)
    chosen = comparison.chosen
    verdict = determine_verdict(comparison)
    flags = collect_flags(comparison, verdict)
    runs = plan_next_runs(comparison, verdict)
    return Decision(
        rank=None if verdict in ("no_gain", "undecided") else chosen,
        recommended_rank=chosen,
        verdict=verdict,
        flags=flags,
        sentence=format_sentence(comparison, margin, verdict, unit, is_default_margin=requested_margin is None),
        next_run=runs[0].sentence,
        metric=table.metric,
        higher_is_better=table.higher_is_better,
        margin=margin,
        reference_rank=evidence.reference.rank,
        confidence=None if comparison.is_indication or evidence.basis == "values" else CONFIDENCE,
        learning_rate=evidence.contenders[chosen].learning_rate or None,
        staircase=build_staircase(comparison, unit),
        ranks=[_build_rank_evidence(comparison, comparison.by_rank[rank], unit) for rank in sorted(comparison.by_rank)],
        basis=evidence.basis,
        basis_note=format_basis_note(evidence),
        requested_confidence=comparison.confidence,
        probability=comparison.by_rank[chosen].probability,
        indistinguishable_ranks=comparison.list_indistinguishable_ranks(),
        next_runs=runs,
        selection_bias=unit.convert_difference(evidence.selection_bias),
    )


def _build_rank_evidence(comparison: Comparison, compared: RankComparison, unit: MetricUnit) -> RankEvidence:
    contender = compared.contender
    is_reference = contender.rank == comparison.reference.rank
    lacks_noise = comparison.evidence.basis == "values" and compared.difference.variance == 0 and not is_reference
    ends = sorted(unit.convert_value(compared.mean.compute_bound(level)) for level in TWO_SIDED)
    return RankEvidence(
        rank=contender.rank,
        value=unit.convert_value(contender.loss),
        low=ends[0],
        high=ends[1],
        difference=unit.convert_difference(compared.difference.mean),
        difference_low=None if lacks_noise else unit.convert_difference(compared.low),
        difference_high=None if lacks_noise else unit.convert_difference(compared.high),
        non_inferior=compared.non_inferior,
        probability=compared.probability,
        learning_rate=contender.learning_rate or None,
        seeds=len(contender.cells),
        trial_ids=[cell.trial_id for cell in contender.cells.values()],
    )


def format_number(value: float) -> str:
    """Format two significant digits: 0.014, 0.0084, 1.2."""
    return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def format_probability(probability: float) -> str:
    """Format a probability. Below a tenth it is not known more precisely (benchmarks/selection)."""
    return "under 10%" if probability < 0.1 else "over 99%" if probability > 0.99 else f"{probability:.0%}"


def format_amount(value: str, evidence: Evidence) -> str:
    """Format the value with its unit: `0.005 nats`, `0.5 in GSM8K`. A metric called `value` adds nothing."""
    if evidence.table.kind in LOSS_KINDS:
        return f"{value} nats"
    return value if evidence.table.metric == "value" else f"{value} in {evidence.table.metric}"


def format_sentence(
    comparison: Comparison, margin: float, verdict: Verdict, unit: MetricUnit, *, is_default_margin: bool
) -> str:
    """Format the answer in a sentence or two. `margin` is in the metric's unit."""
    sentences = [_format_answer(comparison, margin, verdict, unit)]
    if is_default_margin and comparison.evidence.base is None:
        sentences.append("Without a result of the base (rank 0), the margin is the default in the metric's unit.")
    return " ".join([*sentences, *map(_format_outlier, comparison.evidence.outliers)])


def _format_outlier(outlier: Outlier) -> str:
    others = ", ".join(f"{value:.4g}" for value in outlier.other_values)
    return f"Seed {outlier.seed} of rank {outlier.rank} ended at {outlier.value:.4g}, far from its other seeds ({others}), and is left out."


def _format_answer(comparison: Comparison, margin: float, verdict: Verdict, unit: MetricUnit) -> str:
    evidence, chosen, reference = comparison.evidence, comparison.chosen, comparison.reference.rank
    margin_text, caution = format_amount(f"{margin:.4g}", evidence), _format_caution(comparison)
    is_sure = comparison.is_sure(verdict)
    qualifier = "probably " if comparison.confidence is not None and not is_sure else ""
    match verdict:
        case "undecided":
            return _format_undecided(comparison, margin_text, unit)
        case "no_gain":
            return f"{_format_no_gain(comparison, margin_text, unit)}{caution}."
        case "rising":
            return f"Still rising: rank {chosen}, the largest tried, is {qualifier}better than every smaller one by more than {margin_text}{caution}."
        case "overfitting":
            reason = f"above rank {reference} held-out results get worse while training results still improve"
        case _ if chosen == reference:
            reason = "the best of those tried"
        case _ if 0 in comparison.by_rank:
            reason = f"it keeps {_format_share_kept(comparison, chosen, unit)} of what rank {reference} gained"
        case _:
            reason = f"within {margin_text} of the best (rank {reference})"
    likely = comparison.by_rank[chosen].probability
    likely_text = "" if likely is None else f" ({format_probability(likely)} likely)"
    if verdict != "overfitting" and (lower := comparison.next_lower_rank) is not None:
        reason += f"; rank {lower} {_format_lower_rank(comparison, lower, unit)}"
    return f"Rank {chosen} {'is' if is_sure else 'looks'} enough{likely_text}: {reason}{caution}."


def _format_no_gain(comparison: Comparison, margin_text: str, unit: MetricUnit) -> str:
    """Say what the best rank gained over the base: nothing that is shown, or less than the margin."""
    base, reference = comparison.by_rank[0], comparison.reference.rank
    has_bounds = base.difference.variance > 0 or comparison.evidence.basis != "values"
    gain, low, high = (unit.convert_difference(each) for each in (base.difference.mean, base.low, base.high))
    if has_bounds and low > 0:
        return f"No gain beyond the margin: rank {reference} gained {gain:+.2g} over the base, and the margin is {margin_text}"
    return format_no_gain(reference, gain, *((low, high) if has_bounds else (None, None)))


def _format_caution(comparison: Comparison) -> str:
    """Say what limits the answer: one number per rank, one seed, or trainings of different lengths."""
    texts = []
    if comparison.evidence.lacks_uncertainty:
        texts.append("; one number per rank suggests this but does not show it")
    elif comparison.is_indication:
        texts.append("; one seed is an indication")
    if len(steps := comparison.evidence.list_lengths()) > 1:
        texts.append(f"; the trainings have {min(steps):,} to {max(steps):,} steps, so the comparison is not fair")
    return "".join(texts)


def _format_share_kept(comparison: Comparison, rank: int, unit: MetricUnit) -> str:
    """Format the share that the rank keeps of what the reference gained over the base, as measured."""
    lost, gain = (unit.convert_difference(comparison.by_rank[each].difference.mean) for each in (rank, 0))
    return format_share(1 - lost / gain)


def _format_lower_rank(comparison: Comparison, rank: int, unit: MetricUnit) -> str:
    """Say how likely the rank is to be enough or, if it is shown not to be, what it keeps of the gain, or how much worse it is."""
    compared = comparison.by_rank[rank]
    if compared.probability is not None and compared.non_inferior is not False:
        return f"is {format_probability(compared.probability)} likely"
    if 0 in comparison.by_rank:
        return f"keeps {_format_share_kept(comparison, rank, unit)} of the gain"
    difference = unit.convert_difference(compared.difference.mean)
    return f"is {format_number(abs(difference))} {'better' if difference < 0 else 'worse'}"


def _format_undecided(comparison: Comparison, margin_text: str, unit: MetricUnit) -> str:
    """Name the rank that may have failed, or else the likeliest rank and the margin at which it would be enough."""
    evidence, recommended, confidence = comparison.evidence, comparison.chosen, comparison.confidence
    unexplained = find_unexplained_rank(comparison)
    if unexplained is not None:
        return (
            f"Undecided: rank {unexplained} is worse than rank {comparison.reference.rank}, although a larger rank should be about as good: "
            f"its training may have failed.{'' if comparison.is_open else f' Without it, rank {recommended} looks enough.'}"
        )
    assert confidence is not None  # values without uncertainty can tell
    margin = format_number(unit.convert_difference(evidence.compute_margins(confidence)[recommended]))
    likely = format_probability(comparison.by_rank[recommended].probability or 0.0)
    return (
        f"Undecided: no rank is {confidence:.0%} likely to be within {margin_text} of the best. Take rank {recommended}, the likeliest "
        f"({likely}): it is {confidence:.0%} likely to be within {margin}."
    )


# What the intervals cover, and what they leave out.
BASIS_NOTES: dict[Basis, str] = {
    "examples and seeds": "Intervals cover the variation over held-out examples and over seeds.",
    "examples": "Intervals cover only the variation over held-out examples. The noise over seeds is unknown, since there is one seed.",
    "seeds": "Intervals cover the variation over seeds, on these held-out examples.",
    "std": "Intervals are based only on the stated standard deviations.",
    "values": "One number per rank without a stated deviation: the noise of a training is unknown.",
}


def format_basis_note(evidence: Evidence) -> str:
    """Explain which variation the intervals cover, and which they leave out."""
    assumption = next(iter(evidence.reference.cells.values())).assumption if evidence.has_examples else ""
    return f"{BASIS_NOTES[evidence.basis]} {assumption}".rstrip()


CONFIRM_SEEDS = 3
EXAMPLE_COUNTS = (500, 1000, 2000, 5000, 10_000, 20_000, 50_000)  # numbers of held-out examples to suggest


def plan_next_runs(comparison: Comparison, verdict: Verdict) -> list[NextRun]:
    """Plan the next runs, the most useful first. The list is never empty."""
    if verdict == "no_gain":
        return [_plan_after_no_gain(comparison.evidence)]
    evidence, ranks = comparison.evidence, sorted({comparison.chosen, comparison.reference.rank})
    runs: list[NextRun] = []
    if verdict == "undecided":
        if (failed := find_unexplained_rank(comparison)) is not None:
            runs.append(_plan_repetition(comparison, failed))
        if comparison.is_open:
            runs.extend(_plan_runs_for_confidence(comparison))
    elif comparison.chosen == comparison.ranks[-1] and (verdict == "rising" or not evidence.lacks_uncertainty):
        runs.append(_plan_larger_rank(evidence))
    rate_runs = [plan_rate_run(evidence.table, rank, evidence.contenders[rank].learning_rate, ranks) for rank in ranks]
    position = 1 if verdict in ("rising", "undecided") else 0
    runs[position:position] = [run for run in rate_runs if run is not None][:1]
    if verdict != "undecided":
        runs.append(_plan_confirmation(comparison))
    return runs


def _plan_repetition(comparison: Comparison, rank: int) -> NextRun:
    """Plan to repeat the training that probably failed: at a lower learning rate if none was tried, else with another seed."""
    evidence = comparison.evidence
    if evidence.has_lower_rate(rank):
        sentence = f"Train rank {rank} again with another seed ({_format_cost(1)}): it may have failed."
        seeds = len(evidence.contenders[rank].cells) + 1
        return NextRun(action="seeds", ranks=[rank], seeds=seeds, trials=1, sentence=sentence)
    rate = evidence.contenders[rank].learning_rate
    lower = [extrapolate_rate(rate, EDGE_FACTOR * rate, _collect_tried_rates(evidence.table))] if rate > 0 else []
    lower_text = f" ({lower[0]:.2g}, now {rate:.2g})" if lower else ""
    sentence = f"Train rank {rank} again at a lower learning rate{lower_text}: it may have failed."
    return NextRun(action="rates", ranks=[rank], learning_rates=lower, trials=1, sentence=sentence)


def _plan_runs_for_confidence(comparison: Comparison) -> list[NextRun]:
    """Plan more examples, and more seeds, that would give a rank the requested probability. Examples need no training and come first."""
    evidence, confidence, margin = comparison.evidence, comparison.confidence, comparison.margin
    assert confidence is not None
    (seeds, examples), ranks = evidence.size, comparison.list_indistinguishable_ranks()

    def is_reached(more_seeds: int, more_examples: int) -> bool:
        return is_within(min(evidence.compute_margins(confidence, more_seeds, more_examples).values()), margin)

    sizes = [size for size in EXAMPLE_COUNTS if size > examples > 0]
    needed_examples = next((size for size in sizes if is_reached(seeds, size)), None)
    needed_seeds = next((count for count in range(seeds + 1, MAX_SEEDS + 1) if is_reached(count, examples)), None)
    runs: list[NextRun] = []
    if needed_examples is not None:
        sentence = f"To test the margin, score about {needed_examples:,} held-out examples (now {examples:,}) at {format_rank_names(ranks)}."
        runs.append(NextRun(action="examples", ranks=ranks, examples=needed_examples, sentence=sentence))
    if needed_seeds is not None:
        runs.append(_plan_seeds(evidence, ranks, needed_seeds, "test the margin"))
    if not runs:
        sentence = f"No more seeds or examples would settle it at this noise: take rank {comparison.chosen}, or choose another margin."
        runs.append(NextRun(action="none", ranks=[comparison.chosen], sentence=sentence))
    return runs


def _plan_seeds(evidence: Evidence, ranks: list[int], seeds: int, purpose: str) -> NextRun:
    trials = _count_missing_trainings(evidence, ranks, seeds)
    sentence = f"Train {format_rank_names(ranks)} with {seeds} seeds to {purpose} ({_format_cost(trials)})."
    return NextRun(action="seeds", ranks=ranks, seeds=seeds, trials=trials, sentence=sentence)


def _plan_larger_rank(evidence: Evidence) -> NextRun:
    top = evidence.reference
    rate = top.learning_rate
    lrs = [extrapolate_rate(rate, EDGE_FACTOR * rate, _collect_tried_rates(evidence.table)), rate] if rate > 0 else []
    trials = len(lrs) or 1
    at = f" at learning rates {' and '.join(f'{lr:.2g}' for lr in lrs)}" if lrs else ""
    sentence = f"Train rank {2 * top.rank}{at} ({_format_cost(trials)}), or accept a larger margin."
    return NextRun(action="rank", ranks=[2 * top.rank], learning_rates=lrs, trials=trials, sentence=sentence)


def plan_rate_run(table: ScoreTable, rank: int, learning_rate: float, ranks: list[int]) -> NextRun | None:
    """Plan `ranks` at the learning rate beyond the rank's best one, or return None if the best one is not at an edge."""
    rates = table.list_edge_rates(learning_rate, rank)
    if not rates:
        return None
    inner = rates[1] if learning_rate == rates[0] else rates[-2]
    lr = extrapolate_rate(learning_rate, inner, _collect_tried_rates(table))
    sentence = (
        f"The best learning rate of rank {rank} is at the edge of those tried: train {format_rank_names(ranks)} at {lr:.2g} too "
        f"({_format_cost(len(ranks))})."
    )
    return NextRun(action="rates", ranks=ranks, learning_rates=[lr], trials=len(ranks), sentence=sentence)


def _collect_tried_rates(table: ScoreTable) -> set[float]:
    return {rate for rank in table.list_ranks() for rate in table.list_tried_rates(rank)}


def _plan_confirmation(comparison: Comparison) -> NextRun:
    """Plan `CONFIRM_SEEDS` paired seeds at the answer, the next lower rank and the reference."""
    ranks = sorted({comparison.chosen, comparison.reference.rank, comparison.next_lower_rank or comparison.chosen})
    if comparison.evidence.basis == "values":
        sentence = f"One number per rank can't show the answer: score {format_rank_names(ranks)} by example, with {CONFIRM_SEEDS} seeds or more."
        return NextRun(action="examples", ranks=ranks, seeds=CONFIRM_SEEDS, sentence=sentence)
    if _count_missing_trainings(comparison.evidence, ranks, CONFIRM_SEEDS) == 0:
        sentence = f"Evaluate {format_rank_names(ranks)} once on held-out data that was not used for any choice."
        return NextRun(action="test", ranks=ranks, sentence=sentence)
    return _plan_seeds(comparison.evidence, ranks, CONFIRM_SEEDS, "confirm it")


def _plan_after_no_gain(evidence: Evidence) -> NextRun:
    rate = EDGE_FACTOR * max(contender.learning_rate for contender in evidence.contenders.values())
    rates = [float(f"{rate:.2g}")] if rate else []
    return NextRun(
        action="rates",
        ranks=[min(evidence.contenders)],
        learning_rates=rates,
        trials=1,
        sentence=format_no_gain_advice(rate),
    )


def _count_missing_trainings(evidence: Evidence, ranks: list[int], seeds: int) -> int:
    """Count the additional trainings with which each of the ranks has `seeds` seeds."""
    return sum(max(0, seeds - len(evidence.contenders[rank].cells)) for rank in ranks)


def _format_cost(trials: int) -> str:
    return "1 training" if trials == 1 else f"{trials} trainings"


EDGE_FACTOR = 3  # the factor beyond the best learning rate if no other rate suggests one


def extrapolate_rate(edge: float, inner: float, tried_rates: Iterable[float] = ()) -> float:
    """Return a learning rate beyond the edge by the step between the edge and its neighbor.

    A rate that was tried at another rank is preferred if one is near, else a round number.
    """
    if edge == 0 or inner == 0:
        return edge * EDGE_FACTOR or inner / EDGE_FACTOR
    factor = edge / inner
    lr = edge * factor
    for candidate in (*sorted(tried_rates), float(f"{lr:.0e}")):
        if candidate and abs(math.log(candidate / lr)) < abs(math.log(factor)) / 4:
            return candidate
    return float(f"{lr:.3g}")
