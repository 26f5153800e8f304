"""Compare adapters with a reference adapter on the same held-out examples, and put the smallest one within the margin into words.

Two adapters are compared on the same examples, so the claim does not depend on seeds: the only noise is which examples were drawn. Ranks are
tested in a fixed sequence from the top downward, each by the 95% upper bound of its paired difference from the top. The first failure ends
the search (`adapters.find_smallest`), so no correction for multiplicity is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rightrank.decision.comparison import CONFIDENCE, Bounds, compute_file_bounds, compute_score_range, is_within
from rightrank.decision.table import (
    Cell,
    MetricUnit,
    compute_distribution,
    compute_paired_difference,
    format_distribution,
    number_groups,
    orient_scores,
)
from rightrank.schema.decision import AdapterAnswer, AdapterCandidate, AdapterMethod
from rightrank.schema.metrics import LossKind, MetricKind, compute_default_margin, infer_metric_kind

SEARCH_OPTION = "(--goal training-rank)"  # the option that searches the training rank, for notes
# Fields that an answer copies from the chosen candidate.
ANSWER_FIELDS = {"rank", "method", "trial_id", "difference", "difference_high", "distribution"}
MAX_DIRECT_RANK = 4  # at these ranks a direct training can beat a truncation (docs/explanation/science.md)


@dataclass(frozen=True, slots=True)
class Criterion:
    """The metric and the margin by which candidates are compared."""

    metric: str
    higher_is_better: bool
    margin: float | None  # None: the metric's default
    loss: LossKind = "token_loss"  # the kind of a loss
    points_use_metric: bool = True  # False: values during training are losses for every metric
    trusts_values: bool = False  # whether a difference without example scores is treated as exact, as in a replay


@dataclass(frozen=True, slots=True)
class ScoredAdapter:
    """An adapter with its held-out scores."""

    name: str  # trial id, or the name of its folder
    rank: int
    method: AdapterMethod
    cell: Cell
    kind: MetricKind

    @classmethod
    def from_scores(
        cls,
        name: str,
        rank: int,
        value: float,
        example_scores: tuple[Sequence[float], Sequence[float]] | None,
        criterion: Criterion,
        *,
        method: AdapterMethod = "truncated",
        groups: Sequence[int] | None = None,
    ) -> ScoredAdapter:
        """Build the record from scores in the metric's direction.

        Args:
            value: the mean score.
            example_scores: `(score of each example times its weight, weights)`; None if only the mean is known.
            groups: the group of each example; None: no groups.
        """
        kind = infer_metric_kind(criterion.metric, criterion.higher_is_better, criterion.loss)
        kind = "other" if kind == "perplexity" and value <= 0 else kind
        scores, weights = (np.asarray(each, dtype=np.float64) for each in example_scores or ([value], [1.0]))
        scale = (
            weights if kind == "perplexity" else np.ones(1)
        )  # The logarithm applies to the score without its weight.
        sums = orient_scores(scores / scale, kind, criterion.higher_is_better) * scale
        score_range = compute_score_range(kind, scores, weights)
        cell = Cell(name, value, sums, weights, score_range, groups=number_groups(groups, len(weights)))
        return cls(name, rank, method, cell, kind)


@dataclass(frozen=True, slots=True)
class ReferenceComparison:
    """A comparison of adapters with a reference adapter."""

    reference: ScoredAdapter
    adapters: Mapping[str, ScoredAdapter]  # by name; the default margin may depend on their values
    criterion: Criterion

    @property
    def margin(self) -> float:
        """Return the margin in the metric's unit."""
        if self.criterion.margin is not None:
            return self.criterion.margin
        values = [adapter.cell.value for adapter in self.adapters.values()]
        return compute_default_margin(self.reference.kind, self.reference.cell.value, values)

    def compute_bounds(self, cell: Cell, reference: Cell | None = None) -> Bounds:
        """Compute the difference from the reference with its bounds, paired over examples; above 0 is worse.

        The bounds are those with which `compare` compares two adapters. Without scores by example they are the mean.
        """
        worse_by = compute_paired_difference(cell, reference or self.reference.cell)
        if not cell.examples:
            return Bounds(worse_by.loss, worse_by.loss, worse_by.loss)
        return compute_file_bounds(worse_by.sums, worse_by.weights, worse_by.score_range, worse_by.groups)

    def build_candidate(self, adapter: ScoredAdapter) -> AdapterCandidate:
        difference, cell, reference = 0.0, adapter.cell, self.reference
        low = high = 0.0 if adapter is reference else None  # 0 is exact
        distribution = None
        if adapter.name != reference.name:
            bounds = self.compute_bounds(cell)
            unit = MetricUnit(reference.kind, self.criterion.higher_is_better, reference.cell.value)
            difference = unit.convert_difference(bounds.mean)
            if cell.examples:
                low, high = unit.convert_difference(bounds.low), unit.convert_difference(bounds.high)
                paired = compute_paired_difference(cell, reference.cell)
                distribution = compute_distribution(paired, self.margin, unit.convert_difference)
        tested_bound = high if high is not None else difference if self.criterion.trusts_values else math.inf
        return AdapterCandidate(
            rank=adapter.rank,
            method=adapter.method,
            trial_id=adapter.name,
            value=cell.value,
            difference=difference,
            difference_low=low,
            difference_high=high,
            is_within_margin=is_within(tested_bound, self.margin),
            distribution=distribution,
        )


def build_truncation_answer(
    chosen: ScoredAdapter,
    truncations: Iterable[ScoredAdapter],
    comparison: ReferenceComparison,
    notes: Sequence[str] = (),
) -> AdapterAnswer:
    """Build the answer for the chosen adapter among the truncations of the reference, or for the reference itself.

    Args:
        notes: on the training of the reference.
    """
    top, descending = comparison.reference, sorted(truncations, key=lambda adapter: -adapter.rank)
    candidates = [comparison.build_candidate(adapter) for adapter in descending]
    answer = comparison.build_candidate(chosen)
    return build_answer(
        answer,
        top,
        comparison,
        [comparison.build_candidate(top), *candidates],
        _format_answer(answer, comparison, candidates),
        notes=[*_collect_notes(answer, candidates, comparison), *notes, *filter(None, [top.cell.assumption])],
    )


def build_answer(
    chosen: AdapterCandidate,
    top: ScoredAdapter,
    comparison: ReferenceComparison,
    candidates: Sequence[AdapterCandidate],
    sentence: str,
    **optional_fields: Any,
) -> AdapterAnswer:
    """Build the answer for a candidate that was trained at the top rank, or truncated from it."""
    return AdapterAnswer(
        **chosen.model_dump(include=ANSWER_FIELDS),
        trained_rank=top.rank,
        trained_id=top.name,
        reference_id=comparison.reference.name,
        margin=comparison.margin,
        candidates=list(candidates),
        sentence=sentence,
        **optional_fields,
    )


def format_claim(candidate: AdapterCandidate, reference_name: str, comparison: ReferenceComparison) -> str:
    """Format the evidence for an adapter within the margin as the end of a sentence, and a sentence on the distribution."""
    margin = f"{comparison.margin:.4g}"
    if candidate.trial_id == comparison.reference.name:
        return f"it is {reference_name} itself."
    if candidate.difference_high is None:
        return f"its held-out difference from {reference_name} is {candidate.difference:+.2g}, within the margin of {margin}."
    sampling_unit = "tokens" if comparison.reference.kind == "token_loss" else "examples"
    distribution_sentence = "" if candidate.distribution is None else f" {format_distribution(candidate.distribution)}"
    return (
        f"it is no worse than {reference_name} by more than the margin of {margin}, with {CONFIDENCE:.0%} confidence, on average over "
        f"held-out {sampling_unit} (difference {candidate.difference:+.2g}, upper bound {candidate.difference_high:+.2g}).{distribution_sentence}"
    )


def _format_answer(
    answer: AdapterCandidate, comparison: ReferenceComparison, candidates: Sequence[AdapterCandidate]
) -> str:
    margin, top = comparison.margin, comparison.reference
    if answer.rank < top.rank:
        return (
            f"The smallest adapter of this training within the margin has rank {answer.rank}: "
            f"{format_claim(answer, f'the rank {top.rank} adapter', comparison)}"
        )
    lower = max((candidate.rank for candidate in candidates if candidate.rank < top.rank), default=None)
    reason = "no lower rank is measured" if lower is None else f"rank {lower} is not shown"
    if not top.cell.examples:
        reason = "without example scores no truncation can be shown"
    return f"The adapter keeps rank {top.rank}: {reason} to be within the margin of {margin:.4g}."


def _collect_notes(
    answer: AdapterCandidate, candidates: Sequence[AdapterCandidate], comparison: ReferenceComparison
) -> list[str]:
    notes, top = [], comparison.reference
    failed_ranks = [
        candidate.rank for candidate in candidates if candidate.rank < answer.rank and not candidate.is_within_margin
    ]
    if failed_ranks and max(failed_ranks) <= MAX_DIRECT_RANK:
        notes.append(
            f"At rank {max(failed_ranks)} a direct training can beat a truncation; the search for the training rank "
            f"{SEARCH_OPTION} tries it."
        )
    better = [
        candidate
        for candidate in candidates
        if (candidate.difference_high or 0.0) < 0 and -candidate.difference > comparison.margin
    ]
    if small_better := [candidate for candidate in better if candidate.rank <= top.rank / 4]:
        notes.append(
            f"Rank {small_better[0].rank} is better than rank {top.rank} by {-small_better[0].difference:.2g}: the top rank "
            f"overfits; train again with --ranks up to {max(candidate.rank for candidate in small_better)}, or fewer steps."
        )
    return notes
