"""Format the sentences of a decision: the answer, and what the intervals cover."""

from __future__ import annotations

from rightrank.decision.comparison import is_within
from rightrank.decision.evidence import Evidence
from rightrank.decision.ranks import Comparison
from rightrank.decision.table import MetricUnit, Outlier
from rightrank.decision.verdicts import (
    find_doubtful_rank,
    find_unexplained_rank,
    format_rank_names,
)
from rightrank.schema.decision import Verdict
from rightrank.schema.metrics import LOSS_KINDS


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


def format_sentence(comparison: Comparison, margin: float, verdict: Verdict, unit: MetricUnit) -> str:
    """Format the answer in a sentence or two. `margin` is in the metric's unit."""
    sentences = [_format_answer(comparison, margin, verdict, unit)]
    sentences += [_format_base_probability(comparison)] * (verdict != "no_gain")
    return " ".join(filter(None, [*sentences, *map(_format_outlier, comparison.evidence.outliers)]))


def _format_outlier(outlier: Outlier) -> str:
    """Name a training that is left out, with its value and those of the other seeds."""
    rate = f" at learning rate {outlier.learning_rate:g}" if outlier.learning_rate else ""
    lowest, highest = (f"{pick(outlier.other_values):.4g}" for pick in (min, max))
    others = lowest if lowest == highest else f"{lowest} to {highest}"
    return (
        f"Seed {outlier.seed} of rank {outlier.rank}{rate} ended at {outlier.value:.4g}, far from its other seeds ({others}), and is left "
        "out."
    )


def _format_answer(comparison: Comparison, margin: float, verdict: Verdict, unit: MetricUnit) -> str:
    evidence, chosen, reference = comparison.evidence, comparison.chosen, comparison.reference.rank
    margin_text = format_amount(f"{margin:.4g}", evidence)
    is_sure = comparison.is_sure(verdict)
    verb = "is" if is_sure else "looks"
    caution = "; this is an indication from one seed, and more seeds may change it" if comparison.is_indication else ""
    if evidence.lacks_uncertainty:
        caution = "; one number per rank suggests this but does not show it"
    if len(steps := evidence.list_lengths()) > 1:
        caution += f"; the trainings have {min(steps):,} to {max(steps):,} steps, so the comparison is not fair"
    conclusion = f"Rank {chosen} {verb} enough{_format_probabilities(comparison)}"
    qualifier = "probably " if comparison.confidence is not None and not is_sure else ""
    match verdict:
        case "no_gain":
            return (
                f"No gain: the base model itself is {qualifier}within {margin_text} of the best adapter (rank {reference}), "
                f"so there is no rank to choose{caution}."
            )
        case "undecided":
            return _format_undecided(comparison, margin_text, unit)
        case "overfitting":
            return (
                f"{conclusion}: above rank {reference} held-out results get worse while training results still "
                f"improve{caution}."
            )
        case "flat":
            outlier = max(comparison.ranks, key=lambda rank: abs(comparison.by_rank[rank].difference.mean))
            if not is_within(abs(comparison.by_rank[outlier].difference.mean), comparison.margin):
                return (
                    f"{conclusion}: the smallest tried, it is within {margin_text} of the best ({reference}); rank {outlier} "
                    f"looks {_format_difference(comparison, outlier, unit)}, but this is not shown{caution}."
                )
            return (
                f"Rank hardly matters here: rank {chosen}, the smallest tried{_format_probabilities(comparison)}, is within {margin_text} of the best "
                f"({reference}){caution}."
            )
        case "rising":
            return (
                f"Still rising: rank {chosen}, the largest tried, is {qualifier}better than every smaller one by more than "
                f"{margin_text}{caution}."
            )
        case "saturated":
            is_best = chosen == reference
            best = "the best of the ranks tried" if is_best else f"within {margin_text} of the best (rank {reference})"
            start = f"{conclusion}: it is {best}"
            if comparison.next_lower_rank is None:
                return f"{start}, and the smallest tried{caution}."
            next_lower = f"{start}, and the next lower rank ({comparison.next_lower_rank}) is"
            is_shown = (
                comparison.confidence is None or comparison.by_rank[comparison.next_lower_rank].non_inferior is False
            )
            if not is_shown:
                return f"{next_lower} {format_probability(comparison.require_probability(comparison.next_lower_rank))} likely{caution}."
            return f"{next_lower} {_format_difference(comparison, comparison.next_lower_rank, unit)}{caution}."


def _format_difference(comparison: Comparison, rank: int, unit: MetricUnit) -> str:
    """Format the difference of the rank's mean from the reference's, such as `0.014 worse` or `0.002 better`."""
    difference = unit.convert_difference(comparison.by_rank[rank].difference.mean)
    return f"{format_number(abs(difference))} {'better' if difference < 0 else 'worse'}"


def _format_probabilities(comparison: Comparison) -> str:
    """Format the probabilities of the chosen rank and of the likeliest larger one: ` (71% likely; rank 16: 96%)`."""
    probabilities = {
        rank: likely for rank in comparison.ranks if (likely := comparison.compute_probability(rank)) is not None
    }
    if comparison.chosen not in probabilities:
        return ""
    larger_ranks = [
        rank
        for rank in probabilities
        if rank > comparison.chosen and probabilities[rank] > probabilities[comparison.chosen]
    ]
    likeliest = max(larger_ranks, key=lambda rank: (probabilities[rank], -rank), default=None)
    likeliest_text = "" if likeliest is None else f"; rank {likeliest}: {format_probability(probabilities[likeliest])}"
    return f" ({format_probability(probabilities[comparison.chosen])} likely{likeliest_text})"


def format_probability_note(evidence: Evidence) -> str:
    """Explain what the probabilities mean, or why there are none."""
    if evidence.lacks_uncertainty:
        return "No probability: there is one number per rank, which shows no noise."
    start = "The probability of a rank is that of being within the margin of the best, over seeds"
    if not evidence.has_examples:
        return f"{start}. It is computed from the variation of seeds here."
    return f"{start} and over examples like these. It is computed from the variation of seeds and examples here and on earlier grids."


def _format_undecided(comparison: Comparison, margin_text: str, unit: MetricUnit) -> str:
    remark = ""
    if not comparison.is_open:
        remark = f" Without it, rank {comparison.chosen} looks enough{_format_probabilities(comparison)}."
    if (unexplained := find_unexplained_rank(comparison)) is not None:
        return (
            f"Undecided: rank {unexplained} is {_format_difference(comparison, unexplained, unit)} than rank {comparison.reference.rank}, "
            f"although a larger rank should be about as good: its training may have failed.{remark}"
        )
    if (doubtful := find_doubtful_rank(comparison)) is not None:
        return f"Undecided: the two seeds of rank {doubtful} are far apart, and one training may have failed.{remark}"
    return format_cannot_tell(comparison, margin_text, unit)


def format_cannot_tell(comparison: Comparison, margin_text: str, unit: MetricUnit) -> str:
    """Format the indistinguishable ranks, the recommended rank with its probability, and the margin that the data resolve."""
    evidence, recommended, confidence = comparison.evidence, comparison.chosen, comparison.confidence
    assert confidence is not None  # values without uncertainty can tell
    indistinguishable = evidence.find_indistinguishable_ranks(confidence)
    worse_ranks = [rank for rank in comparison.ranks if rank not in indistinguishable]
    margins = evidence.compute_margins(confidence)
    values = (evidence.compute_half_width(confidence), margins[recommended], min(margins.values()))
    width, recommended_margin, smallest_margin = (format_number(unit.convert_difference(value)) for value in values)
    sentences = [
        f"{format_rank_names(indistinguishable).capitalize()} cannot be distinguished (±{width}; the margin is {margin_text})."
        if len(indistinguishable) > 1
        else "",
        f"{format_rank_names(worse_ranks).capitalize()} {'is' if len(worse_ranks) == 1 else 'are'} probably worse."
        if worse_ranks
        else "",
        f"Take rank {recommended}: it is {confidence:.0%} likely to be within {recommended_margin} of the best, and {format_probability(comparison.require_probability(recommended))} likely to be within the margin.",
        f"The smallest margin that these data resolve is {smallest_margin}."
        if smallest_margin != recommended_margin
        else "",
    ]
    return " ".join(filter(None, sentences))


def _format_base_probability(comparison: Comparison) -> str:
    """Format the probability that there is no gain, unless that is improbable."""
    likely = comparison.compute_probability(0) if 0 in comparison.by_rank else None
    if likely is None or comparison.confidence is None or likely <= 1 - comparison.confidence:
        return ""
    return f"The base model itself is {format_probability(likely)} likely to be within the margin."


def format_basis_note(evidence: Evidence) -> str:
    """Explain which variation the intervals cover, and which they leave out."""
    match evidence.basis:
        case "examples and seeds":
            return f"Intervals cover the variation over held-out examples and over seeds.{_format_noise_note(evidence)} {_get_assumption(evidence)}"
        case "examples":
            return (
                "Intervals cover only the variation over held-out examples. The noise over seeds is unknown, since there is one seed. "
                f"{_get_assumption(evidence)}"
            )
        case "seeds":
            return (
                f"Intervals cover the variation over seeds, on these held-out examples.{_format_noise_note(evidence)}"
            )
        case "std":
            return "Intervals are based only on the stated standard deviations."
        case "values":
            if evidence.scatter == 0:
                return "One number per rank without a stated deviation: the noise of a training is unknown."
            return (
                f"One number per rank without a stated deviation: {format_number(evidence.scatter**0.5)}, the scatter about "
                "the curve, is used as the noise of each training."
            )


def _get_assumption(evidence: Evidence) -> str:
    return next(iter(evidence.reference.cells.values())).assumption


def _format_noise_note(evidence: Evidence) -> str:
    """Explain on which seeds the noise was measured."""
    if not evidence.has_seed_noise:
        return " No two ranks share two seeds, so the noise over seeds is measured only within single ranks."
    other_contenders = (contender for contender in evidence.contenders.values() if contender is not evidence.reference)
    seeds = sorted({evidence.estimate_difference(contender).seeds for contender in other_contenders})
    counts = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    moderator = (
        "the noise expected from the variation between examples"
        if evidence.has_examples
        else "the noise of the other ranks"
    )
    has_fewer = any(
        contender.cells.keys() != evidence.reference.cells.keys() for contender in evidence.contenders.values()
    )
    shared = " Ranks with other seeds are adjusted to the seeds of all ranks." if has_fewer else ""
    return f" The noise over seeds is measured on each rank's paired difference over {counts} seeds and moderated by {moderator}.{shared}"
