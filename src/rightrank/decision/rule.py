"""The rule: the smallest rank that is not worse than the best by more than the margin.

The reference is the rank with the best mean, each rank at its best learning rate. The ranks below it are tested from the
top downward, each by the 95% upper bound of its paired difference from the reference, until one fails. A fixed sequence
of tests needs no correction for multiplicity.

A table with one number per rank proves nothing. There the rule reads the differences themselves, as a careful reader of a
published table does; the decision has the flag `underpowered`, and `non_inferior` is None.

Where there are probabilities that a rank is enough (`Evidence.no_probability` says why there may be none), the answer is the smallest rank at which it
reaches `ASKED_CONFIDENCE`, or another confidence that the caller asks for, with one seed and with several; whether the 95% bounds show it too is a
grade beside it. Elsewhere the bounds pick the rank. One seed gives an indication: the decision has the flag `one_seed`, and its `confidence` is None,
since bounds leave out the noise over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rightrank.decision.comparison import CONFIDENCE, TWO_SIDED
from rightrank.decision.evidence import Compared, Comparison, Evidence, Unit, compare, staircase
from rightrank.decision.next_run import next_runs
from rightrank.decision.sentences import basis_note, conflict_sentence, probability_note, sentence_of
from rightrank.decision.table import ScoreTable, at_checkpoint
from rightrank.decision.verdicts import (
    alike_ranks,
    checkpoint_note,
    flags_of,
    grade_of,
    is_open,
    shown_rank,
    verdict_of,
)
from rightrank.schema.decision import Decision, MetricAnswer, RankEvidence
from rightrank.schema.errors import ResultsError
from rightrank.schema.metrics import Checkpoint, default_margin

ASKED_CONFIDENCE = 0.75  # two seeds of the twelve long grids answer 85% at it: `benchmarks/selection/noise_model.py`


def decision_of(
    table: ScoreTable,
    margin: float | None = None,
    *,
    others: Sequence[ScoreTable] = (),
    smallest_if_alike: bool = False,
    confidence: float | None = ASKED_CONFIDENCE,
    checkpoint: Checkpoint = "last",
) -> Decision:
    """The decision that a table supports.

    Args:
        margin: how much worse than the best is still enough, in the metric's unit; None for the default of the metric.
        others: the same trials by other metrics, each compared at its default margin.
        checkpoint: which evaluation of each training is compared, where a table has those during the training.
        smallest_if_alike: answer an undecided comparison with the smallest rank that is not shown to be worse (`no_difference`).
        confidence: name the smallest rank that is enough with this probability, where there are any; None for the rule on bounds.

    Raises:
        ResultsError: fewer than two ranks have a finished trial, or the margin is not above 0.
    """
    given, table = table, at_checkpoint(table, checkpoint)
    evidence, unit, margin = _prepared(table, margin)
    checkpoints = checkpoint_note(given, evidence, checkpoint, unit.oriented_margin(margin))
    tested = compare(evidence, unit.oriented_margin(margin))
    if confidence is not None:
        if not 0.5 <= confidence < 1:
            raise ResultsError(f"confidence {confidence:g} is not allowed: give a probability from 0.5 to below 1")
        tested = tested.at_confidence(confidence)
    chosen = tested.chosen
    verdict = verdict_of(tested)
    comparable = [other for other in others if len(other.ranks()) > 1]
    beside = [_beside(tested.by_rank, other, confidence, checkpoint) for other in comparable]
    flags = flags_of(tested, verdict, beside, checkpoints)
    runs = next_runs(tested, verdict, flags)
    alike = (
        alike_ranks(tested) if is_open(tested) else [chosen]
    )  # a larger rank that is worse leaves the rest of the answer as it is
    if smallest_if_alike and verdict == "undecided" and alike:
        verdict, chosen = "no_difference" if len(alike) > 1 else "saturated", alike[0]
        tested = replace(tested, chosen=chosen)
    rank, fallback = None if verdict in ("no_gain", "undecided") else chosen, shown_rank(tested)
    at_hand = next((named for named in (rank, fallback) if named is not None), tested.reference.rank)
    return Decision(
        rank=rank,
        fallback_rank=fallback,
        best_so_far=tested.reference.rank if fallback is None else None,
        verdict=verdict,
        flags=flags,
        sentence=sentence_of(tested, margin, verdict, unit),
        next_run=runs[0].sentence,
        metric=table.metric,
        higher_is_better=table.higher_is_better,
        margin=margin,
        reference_rank=evidence.reference.rank,
        confidence=None if tested.is_indication or evidence.basis == "values" else CONFIDENCE,
        learning_rate=evidence.contenders[at_hand].learning_rate or None,
        staircase=staircase(tested, unit),
        ranks=[_record(tested, tested.by_rank[rank], unit) for rank in sorted(tested.by_rank)],
        basis=evidence.basis,
        basis_note=basis_note(evidence),
        probability_note=probability_note(evidence),
        grade=grade_of(tested, verdict),
        **_by_probability(tested, unit),
        next_runs=runs,
        winner_gap=unit.difference(max(compared.contender.gap for compared in tested.by_rank.values())),
        checkpoint=checkpoints,
        other_metrics=beside,
    )


def _by_probability(tested: Comparison, unit: Unit) -> dict[str, Any]:
    """The fields of a decision by probabilities; none where bounds decided."""
    evidence, asked, take = tested.evidence, tested.confidence, tested.chosen
    if asked is None:
        return {}
    alike = evidence.alike(asked)
    margins = {rank: unit.difference(margin) for rank, margin in evidence.margins_at(asked).items()}
    return {
        "asked": asked,
        "take": take,
        "probability": tested.probability(take),
        "take_within": margins[take],
        "resolves": min(margins.values()),
        "alike": alike,
        "alike_within": unit.difference(evidence.half_width(asked)),
        "probably_worse": [rank for rank in tested.ranks if rank not in alike],
    }


def _beside(
    by_rank: Mapping[int, Compared], other: ScoreTable, confidence: float | None, checkpoint: Checkpoint
) -> MetricAnswer:
    """The answer by another metric, and whether the two disagree."""
    answer = decision_of(other, confidence=confidence, checkpoint=checkpoint)
    ours = {rank: compared.non_inferior for rank, compared in by_rank.items()}
    theirs = {evidence.rank: evidence for evidence in answer.ranks if evidence.rank > 0}
    against = [rank for rank in ours if rank in theirs and {ours[rank], theirs[rank].non_inferior} == {True, False}]
    return MetricAnswer(
        metric=other.metric,
        higher_is_better=other.higher_is_better,
        margin=answer.margin,
        rank=answer.rank,
        verdict=answer.verdict,
        reference_rank=answer.reference_rank,
        conflict=bool(against),
        sentence=conflict_sentence(other.metric, against, theirs, answer.margin) if against else answer.sentence,
        ranks=answer.ranks,
    )


def _prepared(table: ScoreTable, margin: float | None) -> tuple[Evidence, Unit, float]:
    ranks = table.ranks()
    if len(ranks) < 2:
        raise ResultsError(
            f"{len(ranks)} rank(s) with a finished trial: a comparison needs two or more; train further ranks"
        )
    evidence = Evidence(table)
    unit = Unit(table.kind, table.higher_is_better, 0.0)
    unit = replace(unit, reference=unit.value(evidence.reference.loss))
    if margin is None:
        margin = default_margin(table.kind, unit.reference, table.values())
    if not (margin > 0 and math.isfinite(margin)):
        raise ResultsError(f"margin {margin:g} is not allowed: give a number above 0 in the metric's unit")
    return evidence, unit, margin


def _record(tested: Comparison, compared: Compared, unit: Unit) -> RankEvidence:
    contender = compared.contender
    is_reference = contender.rank == tested.reference.rank
    unknown = tested.evidence.basis == "values" and compared.difference.variance == 0 and not is_reference
    further: dict[str, float] = {}
    if compared.further is not None:
        low, high = (unit.difference(compared.further.bound(level)) for level in TWO_SIDED)
        further = {"further_seed_low": low, "further_seed_high": high}
    ends = sorted(unit.value(compared.mean.bound(level)) for level in TWO_SIDED)
    return RankEvidence(
        rank=contender.rank,
        value=unit.value(contender.loss),
        low=ends[0],
        high=ends[1],
        difference=unit.difference(compared.difference.mean),
        difference_low=None if unknown else unit.difference(compared.low),
        difference_high=None if unknown else unit.difference(compared.high),
        **further,
        non_inferior=compared.non_inferior,
        probability=tested.probability(contender.rank),
        learning_rate=contender.learning_rate or None,
        seeds=len(contender.cells),
        trial_ids=[cell.trial_id for cell in contender.cells.values()],
        winner_gap=unit.difference(contender.gap),
    )
