"""The sentences of a decision: the answer, a conflict between metrics, and what the intervals cover."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rightrank.decision.comparison import is_within
from rightrank.decision.evidence import Comparison, Evidence, Unit
from rightrank.decision.seeds import needed_seeds
from rightrank.decision.verdicts import (
    alike_ranks,
    grade_of,
    inconclusive_rank,
    is_open,
    lengths,
    names,
    possible_rival,
    shown_rank,
    unexplained_rank,
)
from rightrank.schema.decision import RankEvidence, Verdict
from rightrank.schema.metrics import LOSS_KINDS


def number(value: float) -> str:
    """Two significant digits: 0.014, 0.0084, 1.2."""
    return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def chance(probability: float) -> str:
    """A probability as it may be said: below a tenth it is not known better than that (benchmarks/selection)."""
    return "under 10%" if probability < 0.1 else "over 99%" if probability > 0.99 else f"{probability:.0%}"


def amount(value: str, evidence: Evidence) -> str:
    """The value with its unit: `0.005 nats`, `0.5 in GSM8K`. A metric called `value` adds nothing."""
    if evidence.table.kind in LOSS_KINDS:
        return f"{value} nats"
    return value if evidence.table.metric == "value" else f"{value} in {evidence.table.metric}"


def sentence_of(tested: Comparison, margin: float, verdict: Verdict, unit: Unit) -> str:
    """The answer in a sentence or two. `margin` is in the metric's unit."""
    answer = _answer(tested, margin, verdict, unit)
    return answer if verdict == "no_gain" else " ".join(filter(None, (answer, _base_too(tested))))


def _answer(tested: Comparison, margin: float, verdict: Verdict, unit: Unit) -> str:
    evidence, chosen, reference = tested.evidence, tested.chosen, tested.reference.rank
    within = amount(f"{margin:.4g}", evidence)
    verb = "is" if grade_of(tested, verdict) == "shown" else "looks"
    caution = "; one seed indicates this, and further seeds may change it" if tested.is_indication else ""
    if evidence.is_point_reading:
        caution = "; one number per rank can suggest this, not show it"
    if len(steps := lengths(evidence)) > 1:
        caution += f"; the trainings have {min(steps):,} to {max(steps):,} steps, which is no fair comparison"
    enough = f"Rank {chosen} {verb} enough{_likely(tested)}"
    probably = "probably " if tested.confidence is not None and verb == "looks" else ""
    match verdict:
        case "no_gain":
            return (
                f"No gain: the base itself is {probably}within {within} of the best adapter (rank {reference}), "
                f"so there is no rank to choose{caution}."
            )
        case "undecided":
            return _undecided(tested, within, unit)
        case "no_difference":
            return _no_difference(tested, within, unit)
        case "overfitting":
            return (
                f"{enough}: above rank {reference} held-out results get worse while training results still "
                f"improve{caution}."
            )
        case "flat":
            apart = max(tested.ranks, key=lambda rank: abs(tested.by_rank[rank].difference.mean))
            if not is_within(abs(tested.by_rank[apart].difference.mean), tested.margin):
                return (
                    f"{enough}: the smallest tried, it is within {within} of the best ({reference}); rank {apart} "
                    f"looks {_compared(tested, apart, unit)}, and is not shown to be{caution}."
                )
            return (
                f"Rank hardly matters here: rank {chosen}, the smallest tried{_likely(tested)}, is within {within} of the best "
                f"({reference}){caution}."
            )
        case "rising":
            return (
                f"Still rising: rank {chosen}, the largest tried, is {probably}better than every smaller one by more than "
                f"{within}{caution}."
            )
        case "saturated":
            is_best = chosen == reference
            best = "the best of the ranks tried" if is_best else f"within {within} of the best (rank {reference})"
            start = f"{enough}: it is {best}"
            if tested.next_lower is None:
                return f"{start}, and the smallest tried{caution}."
            next_lower = f"{start}, and the next lower rank ({tested.next_lower}) is"
            if tested.confidence is not None and not tested.is_worse(tested.next_lower):
                return f"{next_lower} {chance(tested.likely(tested.next_lower))} likely{caution}."
            if not tested.is_worse(tested.next_lower):
                return f"{next_lower} inconclusive at {_compared(tested, tested.next_lower, unit)}{caution}."
            return f"{next_lower} {_compared(tested, tested.next_lower, unit)}{caution}."


def _compared(tested: Comparison, rank: int, unit: Unit) -> str:
    """`0.014 worse`, `0.002 better`: the rank's mean beside the reference's."""
    difference = unit.difference(tested.by_rank[rank].difference.mean)
    return f"{number(abs(difference))} {'better' if difference < 0 else 'worse'}"


def _likely(tested: Comparison) -> str:
    """The chosen rank's probability, and that of the likeliest larger one: ` (71% likely; rank 16: 96%)`."""
    if tested.confidence is None and tested.evidence.has_several_seeds:
        return ""
    chances = {rank: likely for rank in tested.ranks if (likely := tested.probability(rank)) is not None}
    if tested.chosen not in chances:
        return ""
    larger = [rank for rank in chances if rank > tested.chosen and chances[rank] > chances[tested.chosen]]
    likeliest = max(larger, key=lambda rank: (chances[rank], -rank), default=None)
    beside = "" if likeliest is None else f"; rank {likeliest}: {chance(chances[likeliest])}"
    return f" ({chance(chances[tested.chosen])} likely{beside})"


def probability_note(evidence: Evidence) -> str:
    """What the probabilities say, or why there are none."""
    if evidence.no_probability:
        return f"No probability: {evidence.no_probability}."
    return (
        "The probability is that the rank is within the margin of the best, over seeds and over examples like these, by how far seeds and examples "
        "varied on earlier grids and vary here."
    )


def _no_difference(tested: Comparison, within: str, unit: Unit) -> str:
    """The smallest rank, what speaks for another one, and the seeds that a difference of the margin would take."""
    alike = alike_ranks(tested)
    smallest, reference = alike[0], tested.reference
    noise = tested.evidence.noise(max(alike, key=lambda rank: tested.by_rank[rank].difference.mean))
    deviation = math.sqrt(noise.common + noise.individual)
    measured = len(reference.cells) > 1 and deviation > 0
    at = f" (seed standard deviation {number(unit.difference(deviation))})" if measured else ""
    of_them = "" if smallest == tested.ranks[0] else " of them"
    start = f"No difference between {names(alike)} can be shown at this noise{at}: take rank {smallest}, the smallest{of_them}"
    seeds = needed_seeds(math.sqrt(noise.individual), tested.margin) if noise.individual > 0 else None
    needed = (
        f"; a difference of {within} would take about {seeds} seed{'s' * (seeds != 1)} a rank"
        if measured and seeds
        else ""
    )
    if reference.rank == smallest:
        return f"{start}. It is the best of them as measured{needed}."
    better = number(unit.difference(tested.by_rank[smallest].difference.mean))
    return f"{start}. Rank {reference.rank} looks {better} better{needed}."


def _undecided(tested: Comparison, within: str, unit: Unit) -> str:
    compared, reference = tested.by_rank, tested.reference.rank
    if (unexplained := unexplained_rank(tested)) is not None:
        without = "" if is_open(tested) else f" Without it rank {tested.chosen} looks enough{_likely(tested)}."
        return (
            f"Undecided: rank {unexplained} is {_compared(tested, unexplained, unit)} than rank {reference}, where a larger rank should be about as good: "
            f"its training may have failed.{without}"
        )
    if tested.confidence is not None:
        return cannot_tell(tested, tested.confidence, within, unit)
    inconclusive = inconclusive_rank(tested)
    if inconclusive is None:
        rival = possible_rival(tested)
        assert rival is not None
        better = number(unit.difference(-compared[rival].low))
        return (
            f"Undecided: rank {reference} has the best mean, but rank {rival} may be better by up to {better}, "
            f"more than the margin of {within}."
        )
    low, high = (number(unit.difference(value)) for value in (compared[inconclusive].low, compared[inconclusive].high))
    worse = _compared(tested, inconclusive, unit)
    if inconclusive == 0:
        return (
            f"Undecided whether there is any gain: the base is {worse} than the best adapter (bounds {low} to {high}), "
            f"and the margin is {within}."
        )
    smallest = shown_rank(tested)
    if smallest is None:
        shown = f"rank {reference} is the best so far"
    else:
        shown = f"rank {smallest} is within {within} of the best (rank {reference})"
    probability = tested.probability(inconclusive)
    likely = "" if probability is None else f", {chance(probability)} likely enough"
    return f"Undecided: {shown}, and rank {inconclusive} is inconclusive at {worse} (bounds {low} to {high}{likely})."


def cannot_tell(tested: Comparison, asked: float, within: str, unit: Unit) -> str:
    """Which ranks cannot be told apart and by how much, the rank to take and how likely it is enough, and what the evidence resolves."""
    evidence, take = tested.evidence, tested.chosen
    alike = evidence.alike(asked)
    worse = [rank for rank in tested.ranks if rank not in alike]
    margins = evidence.margins_at(asked)
    values = (evidence.half_width(asked), margins[take], min(margins.values()))
    width, enough, least = (number(unit.difference(value)) for value in values)
    parts = [
        f"{names(alike).capitalize()} cannot be told apart (±{width}; the margin is {within})."
        if len(alike) > 1
        else "",
        f"{names(worse).capitalize()} {'is' if len(worse) == 1 else 'are'} probably worse." if worse else "",
        f"Take rank {take}: {asked:.0%} likely to be within {enough} of the best, {chance(tested.likely(take))} within the margin.",
        f"The smallest margin that these data resolve is {least}." if least != enough else "",
    ]
    return " ".join(filter(None, parts))


def _base_too(tested: Comparison) -> str:
    """How likely it is that there is no gain, where that is not improbable."""
    likely = tested.probability(0) if 0 in tested.by_rank else None
    if likely is None or tested.confidence is None or likely <= 1 - tested.confidence:
        return ""
    return f"The base itself is {chance(likely)} likely to be within the margin."


def conflict_sentence(metric: str, against: Sequence[int], theirs: Mapping[int, RankEvidence], margin: float) -> str:
    """How another metric disagrees, for the largest rank on which the two differ."""
    rank = max(against)
    if theirs[rank].non_inferior:
        return f"{metric} disagrees: by it rank {rank} is enough, within its margin of {margin:.4g}."
    difference = number(abs(theirs[rank].difference or 0.0))
    return f"{metric} disagrees: by it rank {rank} is {difference} worse, more than its margin of {margin:.4g}."


def basis_note(evidence: Evidence) -> str:
    """What the intervals cover, and what they leave out."""
    match evidence.basis:
        case "items and seeds":
            return f"Intervals cover other held-out examples and other seeds.{_noise_note(evidence)} {_assumption(evidence)}"
        case "items":
            return (
                "Intervals cover other held-out examples alone. The noise over seeds is unknown: one seed does not show it. "
                f"{_assumption(evidence)}"
            )
        case "seeds":
            return f"Intervals cover other seeds, on these held-out examples.{_noise_note(evidence)}"
        case "std":
            return "Intervals rest on the stated standard deviations alone."
        case "values":
            if evidence.scatter == 0:
                return "One number per rank without a stated deviation: the noise of a training is unknown."
            return (
                f"One number per rank without a stated deviation: {number(evidence.scatter**0.5)}, the scatter about "
                "the curve, is taken as the noise of each training."
            )


def _assumption(evidence: Evidence) -> str:
    return next(iter(evidence.reference.cells.values())).assumption


def _noise_note(evidence: Evidence) -> str:
    """What the noise over seeds was measured on."""
    if not evidence.measures_seeds:
        return " No two ranks share two seeds, so the noise over seeds is known of single ranks alone."
    others = (contender for contender in evidence.contenders.values() if contender is not evidence.reference)
    seeds = sorted({evidence.difference(contender).seeds for contender in others})
    counts = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    by = "what its variation between examples leads to expect" if evidence.has_examples else "the other ranks'"
    return f" The noise over seeds is that of each rank's paired difference over {counts} seeds, moderated by {by}."
