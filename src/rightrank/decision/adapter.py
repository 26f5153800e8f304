"""Compare adapters with a reference adapter on the same held-out examples, and put the smallest one within the margin into words.

Two adapters are compared on the same examples, so the claim does not depend on seeds: the only noise is which examples were drawn. Ranks are
tested in a fixed sequence from the top downward. The first failure ends the search (`adapters.find_smallest`), so no correction for
multiplicity is needed.

The margin is a share m of what the reference t gained over the base b. An adapter s is enough if the 95% upper bound of the mean of
(s - t) - m·(b - t) is at most 0, paired over examples. This needs no ratio of noisy numbers, and shares are not cut at 0% or 100%. The base
is the trained state with a zero update: trained heads stay. Without a base, the upper bound of s - t is compared with a margin in the metric's
unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rightrank.decision.comparison import (
    CONFIDENCE,
    INTERVAL,
    Bounds,
    compute_file_bounds,
    compute_required_examples,
    estimate_file_difference,
    format_no_gain,
    is_within,
)
from rightrank.decision.table import (
    Cell,
    MetricUnit,
    build_cell,
    compute_paired_difference,
)
from rightrank.schema.metrics import (
    LossKind,
    Margin,
    MetricKind,
    compute_margin,
    get_margin_share,
    infer_metric_kind,
)
from rightrank.schema.results import AdapterAnswer, AdapterCandidate, AdapterMethod, Gain, MetricComparison, ShareStep

# Fields that an answer copies from the chosen candidate.
ANSWER_FIELDS = {
    "rank",
    "method",
    "trial_id",
    "difference",
    "difference_high",
    "share_kept",
    "share_kept_low",
}
STEP_SHARES = (0.99, 0.98, 0.95, 0.9)  # shares of the gain for which an answer names the smallest rank
MAX_WIDER_PERCENT = 50  # of the gain, as a margin that is suggested
MAX_STEPS = 60  # of the search for a bound of a share
SHARE_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Criterion:
    """The metric and the margin by which candidates are compared."""

    metric: str
    higher_is_better: bool
    margin: Margin | None  # None: the default
    loss: LossKind = "token_loss"  # the kind of a loss
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
        cell = build_cell(name, value, example_scores, kind, criterion.higher_is_better, groups)
        return cls(name, rank, method, cell, kind)


@dataclass(frozen=True)
class ReferenceComparison:
    """A comparison of adapters with a reference adapter and with the base."""

    reference: ScoredAdapter
    adapters: Mapping[str, ScoredAdapter]  # by name; their values tell a percentage from a fraction
    criterion: Criterion
    base: ScoredAdapter | None = None  # the trained state with a zero update; None: not measured

    @cached_property
    def unit(self) -> MetricUnit:
        return MetricUnit(self.reference.kind, self.criterion.higher_is_better, self.reference.cell.value)

    @cached_property
    def gain_bounds(self) -> Bounds | None:
        """Return how much worse than the reference the base is, in the oriented unit; None without a base."""
        if self.base is None:
            return None
        if self.base.cell.examples == self.reference.cell.examples:
            return self.compute_bounds(self.base.cell)
        gain = self.base.cell.loss - self.reference.cell.loss  # a base with one number: treated as exact
        return Bounds(gain, gain, gain)

    @property
    def gain(self) -> Gain | None:
        """Return what the reference gained over the base, in the metric's unit; None without a base."""
        bounds = self.gain_bounds
        if bounds is None:
            return None
        return Gain(**{name: self.unit.convert_difference(getattr(bounds, name)) for name in ("mean", "low", "high")})

    @property
    def has_no_gain(self) -> bool:
        """Return whether the reference is not shown to be better than the base. No adapter is enough then."""
        return self.gain_bounds is not None and self.gain_bounds.low <= 0

    @property
    def share(self) -> float | None:
        """Return the margin as a share of the gain; None for a margin in the metric's unit, and without a base."""
        return None if self.base is None else get_margin_share(self.criterion.margin)

    @property
    def margin(self) -> float:
        """Return the margin in the metric's unit."""
        reference, gain, margin = self.reference, self.gain, self.criterion.margin
        values = [adapter.cell.value for adapter in self.adapters.values()]
        # After a training there is always an answer, so a share without a base becomes the default, and a note says so.
        margin = None if gain is None and isinstance(margin, str) else margin
        return compute_margin(margin, reference.kind, reference.cell.value, values, None if gain is None else gain.mean)

    def compute_bounds(self, cell: Cell, reference: Cell | None = None) -> Bounds:
        """Compute the difference from the reference with its bounds, paired over examples; above 0 is worse.

        The bounds are those with which `compare` compares two adapters. Without scores by example they are the mean.
        """
        worse_by = compute_paired_difference(cell, reference or self.reference.cell)
        if not cell.examples:
            return Bounds(worse_by.loss, worse_by.loss, worse_by.loss)
        return compute_file_bounds(worse_by.sums, worse_by.weights, worse_by.score_range, worse_by.groups)

    def compute_contrast(self, cell: Cell, share: float) -> Bounds:
        """Compute the bounds of (s - t) - share·(b - t) for the adapter s; there must be a base."""
        return self._build_contrast(cell)(share)

    def _build_contrast(self, cell: Cell) -> Callable[[float], Bounds]:
        """Build the function from a share to the bounds of the contrast; what does not depend on the share is computed once.

        The contrast of losses is paired by example. For bounded scores, whose bounds allow for examples that have not been drawn, the
        bounds of both differences are combined as in Zou and Donner (2008, "Construction of confidence limits about effect measures",
        Statistics in Medicine 27).
        """
        gain, base = self.gain_bounds, self.base
        assert gain is not None
        assert base is not None
        worse_by = compute_paired_difference(cell, self.reference.cell)
        if base.cell.examples == cell.examples > 0 and not worse_by.score_range:
            gained = compute_paired_difference(base.cell, self.reference.cell).sums
            return lambda share: compute_file_bounds(
                worse_by.sums - share * gained, worse_by.weights, groups=worse_by.groups
            )
        worse = self.compute_bounds(cell)

        def combine_bounds(share: float) -> Bounds:
            mean = worse.mean - share * gain.mean
            nearer, farther = (gain.low, gain.high) if share >= 0 else (gain.high, gain.low)
            return Bounds(
                mean,
                mean - math.hypot(worse.mean - worse.low, share * (farther - gain.mean)),
                mean + math.hypot(worse.high - worse.mean, share * (gain.mean - nearer)),
            )

        return combine_bounds

    def compute_lost_share(self, cell: Cell) -> Bounds | None:
        """Compute the share of the gain that an adapter loses, with the shares at which a bound of the contrast is 0.

        None if there is no gain, or no scores by example.
        """
        gain = self.gain_bounds
        if gain is None or gain.low <= 0:
            return None
        lost = self.compute_bounds(cell).mean / gain.mean
        if not cell.examples:
            return Bounds(lost, lost, lost)
        contrast = self._build_contrast(cell)
        low = _find_zero(lambda share: contrast(share).low, lost, gain.mean)
        high = _find_zero(lambda share: contrast(share).high, lost, gain.mean)
        return Bounds(lost, low, high)

    def compute_needed_examples(self, adapter: ScoredAdapter) -> int | None:
        """Compute the number of examples that are expected to tell whether the adapter is within the margin; None: unknown, or too many."""
        cell, share, base = adapter.cell, self.share, self.base
        if not cell.examples or (share is not None and base and base.cell.examples != cell.examples):
            return None
        paired = compute_paired_difference(cell, self.reference.cell)
        sums, margin = paired.sums, self.unit.convert_margin(self.margin)
        if share is not None and base is not None:
            sums = sums - share * compute_paired_difference(base.cell, self.reference.cell).sums
            margin = 0.0
        return compute_required_examples(
            estimate_file_difference(sums, paired.weights, paired.score_range, paired.groups), margin
        )

    def build_candidate(self, adapter: ScoredAdapter) -> AdapterCandidate:
        difference, cell, reference = 0.0, adapter.cell, self.reference
        low = high = 0.0 if adapter is reference else None  # 0 is exact
        lost = None if self.gain_bounds is None or self.has_no_gain else Bounds(0.0, 0.0, 0.0)
        is_within_margin = True
        if adapter.name != reference.name:
            bounds, unit, lost = self.compute_bounds(cell), self.unit, self.compute_lost_share(cell)
            difference = unit.convert_difference(bounds.mean)
            if cell.examples:
                low, high = unit.convert_difference(bounds.low), unit.convert_difference(bounds.high)
            is_within_margin = self._is_within_margin(cell, high, difference)
        return AdapterCandidate(
            rank=adapter.rank,
            method=adapter.method,
            trial_id=adapter.name,
            value=cell.value,
            difference=difference,
            difference_low=low,
            difference_high=high,
            is_within_margin=is_within_margin,
            share_kept=lost and 1 - lost.mean,
            share_kept_low=None if lost is None or high is None else 1 - lost.high,
            share_kept_high=None if lost is None or high is None else 1 - lost.low,
        )

    def _is_within_margin(self, cell: Cell, high: float | None, difference: float) -> bool:
        """Return whether the adapter is shown to be within the margin. `high` and `difference` are in the metric's unit."""
        if self.has_no_gain or (high is None and not self.criterion.trusts_values):
            return False
        if self.share is None:
            return is_within(difference if high is None else high, self.margin)
        return is_within(self.compute_contrast(cell, self.share).high, 0.0)


def _find_zero(bound: Callable[[float], float], start: float, slope: float) -> float:
    """Find where a bound that falls with about this slope is 0, from a start near it, by the secant method."""
    previous, value = start, bound(start)
    current = start + value / slope
    for _ in range(MAX_STEPS):
        previous_value, value = value, bound(current)
        if value == previous_value or abs(current - previous) < SHARE_TOLERANCE:
            break
        previous, current = current, current - value * (current - previous) / (value - previous_value)
    return current


def build_truncation_answer(
    chosen: ScoredAdapter,
    truncations: Iterable[ScoredAdapter],
    comparison: ReferenceComparison,
) -> AdapterAnswer:
    """Build the answer for the chosen adapter among the truncations of the reference, or for the reference itself."""
    top, descending = comparison.reference, sorted(truncations, key=lambda adapter: -adapter.rank)
    candidates = [comparison.build_candidate(adapter) for adapter in descending]
    answer, steps = comparison.build_candidate(chosen), build_share_steps(candidates)
    return build_answer(
        answer,
        top,
        comparison,
        [comparison.build_candidate(top), *candidates],
        _format_answer(answer, comparison, candidates, descending) + format_steps(steps, answer.rank),
        notes=[*_collect_notes(candidates, comparison), *filter(None, [top.cell.assumption])],
        staircase=steps,
    )


def build_share_steps(candidates: Iterable[AdapterCandidate]) -> list[ShareStep]:
    """Return the smallest rank that keeps at least each of `STEP_SHARES`, by the same fixed sequence for each share, without repetitions."""
    steps: list[ShareStep] = []
    descending = sorted(candidates, key=lambda candidate: -candidate.rank)
    for share in STEP_SHARES:
        smallest = None
        for candidate in descending:
            if candidate.share_kept_low is None or candidate.share_kept_low < share:
                break
            smallest = candidate.rank
        if smallest is not None and (not steps or smallest < steps[-1].rank):
            steps.append(ShareStep(share=share, rank=smallest))
    return steps


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
        margin_share=comparison.share,
        gain=comparison.gain,
        candidates=list(candidates),
        sentence=sentence,
        **optional_fields,
    )


def format_no_gain_advice(rate: float = 0.0) -> str:
    """Say what to change after a training without a gain. `rate`: a learning rate to try; 0: unknown."""
    example = f", such as {rate:.2g}" if rate else ""
    return f"Try learning rates beyond those tried{example}, then more steps, then more data."


def format_share(share: float) -> str:
    """Format a share of the gain with one digit after the point, and two near 100%."""
    digits = 2 if 0.9995 <= share < 1 else 1
    return f"{share:.{digits}%}".replace(".0%", "%")


def format_margin(answer: AdapterAnswer | MetricComparison) -> str:
    """Format the margin of an answer or of a comparison as a share of the gain if it is one, with its value in the metric's unit."""
    return (
        f"{answer.margin:.4g}"
        if answer.margin_share is None
        else f"{format_share(answer.margin_share)} of the gain ({answer.margin:.2g})"
    )


def format_claim(candidate: AdapterCandidate, reference_name: str, comparison: ReferenceComparison) -> str:
    """Format the evidence for an adapter within the margin as a sentence that begins with its rank."""
    name, amount = f"Rank {candidate.rank}", f"{candidate.difference:+.2g}"
    if candidate.trial_id == comparison.reference.name:
        return f"{name} is {reference_name} itself."
    if candidate.share_kept is not None:
        bound = (
            f" (at least {format_share(candidate.share_kept_low)}, {CONFIDENCE:.0%} confidence)"
            if candidate.share_kept_low is not None
            else ""
        )
        return f"{name} keeps {format_share(candidate.share_kept)} of what {reference_name} gained{bound}."
    margin = f"{comparison.margin:.4g}"
    if candidate.difference_high is None:
        return f"{name} differs from {reference_name} by {amount}, within the margin of {margin}."
    return (
        f"{name} is no worse than {reference_name} by more than the margin of {margin} "
        f"(difference {amount}, at most {candidate.difference_high:+.2g} with {CONFIDENCE:.0%} confidence)."
    )


def format_steps(steps: Iterable[ShareStep], rank: int) -> str:
    """Format the ranks below `rank` that keep less as a sentence such as "98%: rank 4 · 95%: rank 2."; empty if there are none."""
    texts = [f"{format_share(step.share)}: rank {step.rank}" for step in steps if step.rank < rank]
    return f" {' · '.join(texts)}." if texts else ""


def _format_answer(
    answer: AdapterCandidate,
    comparison: ReferenceComparison,
    candidates: Sequence[AdapterCandidate],
    truncations: Sequence[ScoredAdapter],
) -> str:
    top, gain = comparison.reference, comparison.gain
    if gain is not None and comparison.has_no_gain:
        statement = format_no_gain(top.rank, gain.mean, gain.low, gain.high)
        return f"{statement}, so no rank is called enough. {format_no_gain_advice()}"
    if answer.rank < top.rank:
        return format_claim(answer, f"rank {top.rank}", comparison)
    lower = max(
        (candidate for candidate in candidates if candidate.rank < top.rank), key=lambda c: c.rank, default=None
    )
    if lower is None:
        return f"Rank {top.rank} is kept: no lower rank was measured."
    if not top.cell.examples:
        return f"Rank {top.rank} is kept: without a score for each example no lower rank can be shown to be enough."
    adapter = next(adapter for adapter in truncations if adapter.name == lower.trial_id)
    return _format_top_rank(lower, adapter, comparison)


def _format_top_rank(lower: AdapterCandidate, adapter: ScoredAdapter, comparison: ReferenceComparison) -> str:
    """Say why the top rank is kept: the next lower one loses more than the margin, or the examples cannot tell."""
    top, rows = comparison.reference, f"{comparison.reference.cell.examples:,} held-out rows"
    share, low, high = comparison.share, lower.share_kept_low, lower.share_kept_high
    if share is not None and low is not None and high is not None:
        evidence = f"keeps between {format_share(low)} and {format_share(high)} of what rank {top.rank} gained"
        bound = format_share(1 - share)
    else:
        bound = f"within {comparison.margin:.4g}"
        evidence = (
            f"is worse than rank {top.rank} by between {lower.difference_low:+.2g} and {lower.difference_high:+.2g}"
        )
    if not _is_open(lower, share, comparison.margin):
        return f"Rank {top.rank} is kept: rank {lower.rank} {evidence} ({INTERVAL:.0%} interval), not {bound}."
    needed = comparison.compute_needed_examples(adapter)
    more = "more held-out rows" + (f" (about {needed:,})" if needed else "")
    wider = _compute_wider_margin(lower, share)
    return (
        f"Rank {top.rank} is kept, since lower ranks are undecided: with these {rows} rank {lower.rank} {evidence}. To decide: {more}"
        f"{f', or --margin {wider}, which costs no training' if wider else ''}."
    )


def is_shown_enough(candidate: AdapterCandidate, answer: AdapterAnswer) -> bool | None:
    """Return whether a candidate is shown to be enough; None if the bounds leave it open."""
    if candidate.is_within_margin or answer.has_no_gain or candidate.trial_id == answer.reference_id:
        return candidate.is_within_margin
    return None if _is_open(candidate, answer.margin_share, answer.margin) else False


def _is_open(candidate: AdapterCandidate, share: float | None, margin: float) -> bool:
    """Return whether the bounds of a candidate that is not shown to be enough allow that it is."""
    if share is not None and candidate.share_kept_high is not None:
        return candidate.share_kept_high > 1 - share
    return candidate.difference_low is not None and is_within(candidate.difference_low, margin)


def _compute_wider_margin(candidate: AdapterCandidate, share: float | None) -> str | None:
    """Return the margin, rounded up, at which the candidate would be enough; None if it would be more than half of the gain."""
    if share is None or candidate.share_kept_low is None:
        return None if candidate.difference_high is None else f"{1.05 * candidate.difference_high:.2g}"
    percent = math.ceil(100 * (1 - candidate.share_kept_low) - 1e-9)
    return f"{percent}%" if percent <= MAX_WIDER_PERCENT else None


def find_wider_margin(answer: AdapterAnswer) -> str | None:
    """Return the margin at which the next lower rank would be enough, if the examples leave open whether it is."""
    lower = next((candidate for candidate in answer.candidates if candidate.rank < answer.trained_rank), None)
    if lower is None or answer.rank < answer.trained_rank or answer.has_no_gain:
        return None
    is_undecided = _is_open(lower, answer.margin_share, answer.margin)
    return _compute_wider_margin(lower, answer.margin_share) if is_undecided else None


def _collect_notes(candidates: Sequence[AdapterCandidate], comparison: ReferenceComparison) -> list[str]:
    notes, top, share = [], comparison.reference, get_margin_share(comparison.criterion.margin)
    if comparison.base is None and share is not None:
        notes.append(
            f"The base was not measured, so there is no gain to keep {1 - share:.0%} of, and the "
            f"margin is {comparison.margin:.4g} in the metric's unit."
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
