"""The decision rule: the smallest rank that is not worse than the best by more than the margin.

The probability of a rank is that of being within the margin of every other rank at once, each at its best learning rate, by the joint
distribution of their means (`Evidence.joint`). The answer is the smallest rank whose probability is at least `DEFAULT_CONFIDENCE`, or
another confidence that the caller requests. The 95% bounds of each rank's paired difference from the reference, the rank with the
best mean, are evidence beside it. One seed gives an indication: the decision
has the flag `one_seed`, and its `confidence` is None, since bounds exclude the noise over seeds.

A table with one number per rank proves nothing. There the rule compares the values themselves, as a careful reader of a published table
would; the decision has the flag `underpowered`, and `non_inferior` is None.

More seeds or examples are planned with the present differences, which are themselves uncertain: a plan is no guarantee. The command of a
planned run is in `schema.events`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from rightrank.decision.adapter import format_no_gain_advice, format_share
from rightrank.decision.comparison import CONFIDENCE, MAX_SEEDS, TWO_SIDED, format_no_gain, is_within
from rightrank.decision.evidence import Evidence
from rightrank.decision.ranks import (
    DEFAULT_CONFIDENCE,
    Comparison,
    RankComparison,
    build_staircase,
    collect_flags,
    compare_ranks,
    determine_verdict,
    find_unexplained_rank,
    format_rank_names,
)
from rightrank.decision.table import MetricUnit, Outlier, ScoreTable, select_checkpoint
from rightrank.schema.errors import ResultsError
from rightrank.schema.metrics import LOSS_KINDS, Checkpoint, Margin, parse_margin
from rightrank.schema.results import Basis, Decision, NextRun, RankEvidence, Verdict


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
            f"{len(ranks)} rank(s) with a finished trial: a comparison needs two or more; train more ranks"
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
