"""The decision rule: the smallest rank that is not worse than the best by more than the margin.

The probability of a rank is that of being within the margin of every other rank at once, each at its best learning rate, by the joint
distribution of their means (`Evidence.joint`). The answer is the smallest rank whose probability is at least `DEFAULT_CONFIDENCE`, or
another confidence that the caller requests. The 95% bounds of each rank's paired difference from the reference, the rank with the
best mean, are evidence beside it. One seed gives an indication: the decision
has the flag `one_seed`, and its `confidence` is None, since bounds exclude the noise over seeds.

A table with one number per rank proves nothing. There the rule compares the values themselves, as a careful reader of a published table
would; the decision has the flag `underpowered`, and `non_inferior` is None.
"""

from __future__ import annotations

from typing import Any

from rightrank.decision.comparison import CONFIDENCE, TWO_SIDED
from rightrank.decision.evidence import Evidence
from rightrank.decision.next_run import plan_next_runs
from rightrank.decision.ranks import (
    DEFAULT_CONFIDENCE,
    Comparison,
    RankComparison,
    build_staircase,
    compare_ranks,
)
from rightrank.decision.sentences import format_basis_note, format_sentence
from rightrank.decision.table import MetricUnit, ScoreTable, select_checkpoint
from rightrank.decision.verdicts import (
    collect_flags,
    determine_verdict,
)
from rightrank.schema.decision import Decision, RankEvidence
from rightrank.schema.errors import ResultsError
from rightrank.schema.metrics import Checkpoint, Margin, parse_margin


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
    table = select_checkpoint(table, checkpoint)
    evidence, unit, margin = _prepare_comparison(table, margin)
    if not 0.5 <= confidence < 1:
        raise ResultsError(f"confidence {confidence:g} is not allowed: give a probability from 0.5 to below 1")
    comparison = compare_ranks(evidence, unit.convert_margin(margin), confidence)
    chosen = comparison.chosen
    verdict = determine_verdict(comparison)
    flags = collect_flags(comparison, verdict)
    runs = plan_next_runs(comparison, verdict, flags)
    return Decision(
        rank=None if verdict in ("no_gain", "undecided") else chosen,
        recommended_rank=chosen,
        verdict=verdict,
        flags=flags,
        sentence=format_sentence(comparison, margin, verdict, unit),
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
        **_build_probability_fields(comparison),
        next_runs=runs,
        selection_bias=unit.convert_difference(evidence.selection_bias),
    )


def _build_probability_fields(comparison: Comparison) -> dict[str, Any]:
    """Return the fields of a decision by probabilities; empty if the values decided."""
    evidence, confidence, recommended = comparison.evidence, comparison.confidence, comparison.chosen
    if confidence is None:
        return {}
    return {
        "requested_confidence": confidence,
        "probability": comparison.compute_probability(recommended),
        "indistinguishable_ranks": evidence.find_indistinguishable_ranks(confidence),
    }


def _prepare_comparison(table: ScoreTable, margin: Margin | None) -> tuple[Evidence, MetricUnit, float]:
    ranks = table.list_ranks()
    if len(ranks) < 2:
        raise ResultsError(
            f"{len(ranks)} rank(s) with a finished trial: a comparison needs two or more; train more ranks"
        )
    evidence = Evidence(table)
    try:
        margin = parse_margin(margin)
    except ValueError as error:
        raise ResultsError(str(error)) from None
    return evidence, evidence.unit, evidence.resolve_margin(margin)


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
        probability=comparison.compute_probability(contender.rank),
        learning_rate=contender.learning_rate or None,
        seeds=len(contender.cells),
        trial_ids=[cell.trial_id for cell in contender.cells.values()],
    )
