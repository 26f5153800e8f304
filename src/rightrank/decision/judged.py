"""The decision on judgements: which of two ranks answered a prompt better, by people or models.

A rank's score is its win rate against the reference, with ties as halves. It is enough if the one-sided 95% lower bound of its win rate is
above 1/2 - margin, so the margin is a win rate too: .05 accepts a rank that wins 45 of 100. The interval resamples prompts and
judges (`maths.clustered`). Ranks are tested from the reference downward until one fails, as in `rule`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rightrank.decision.judge import CONFIDENCE, descending
from rightrank.errors import ResultsError
from rightrank.maths.clustered import clustered_mean
from rightrank.maths.intervals import Estimate, two_sided
from rightrank.records import Decision, NextRun, RankEvidence, StaircaseStep, Verdict
from rightrank.records.judgement import Judgement

METRIC = "win_rate"
WIN_RATE_MARGIN = 0.05
EVEN = 0.5
MIN_JUDGEMENTS = 2  # of a rank against the reference


@dataclass(frozen=True, slots=True)
class _Judged:
    """One rank against the reference; `worse` is 1/2 minus its win rate."""

    rank: int
    worse: Estimate

    @property
    def low(self) -> float:
        return max(-EVEN, self.worse.bound(1 - CONFIDENCE))

    @property
    def high(self) -> float:
        return min(EVEN, self.worse.bound(CONFIDENCE))

    def holds(self, margin: float) -> bool | None:
        return True if self.high < margin else False if self.low > margin else None


def reference_of(judgements: Sequence[Judgement]) -> int:
    """The rank that is compared with the most others; the largest of several."""
    others: dict[int, set[int]] = {}
    for one in judgements:
        others.setdefault(one.rank_a, set()).add(one.rank_b)
        others.setdefault(one.rank_b, set()).add(one.rank_a)
    return max(others, key=lambda rank: (len(others[rank]), rank))


def decide_judged(
    judgements: Sequence[Judgement], margin: float | None = None, reference: int | None = None
) -> Decision:
    """The decision that the judgements support.

    Args:
        judgements: only those of a pair with the reference count.
        margin: how far below 1/2 a win rate may be; None for .05.
        reference: None for the rank that is compared with the most others.

    Raises:
        ResultsError: a margin that is no win rate, or no rank with two judgements against the reference.
    """
    margin = WIN_RATE_MARGIN if margin is None else margin
    if not 0 < margin < EVEN:
        raise ResultsError(f"margin {margin:g} is not allowed: a win rate's margin is above 0 and below 0.5")
    top = reference_of(judgements) if reference is None else reference
    judged = _all(judgements, top)
    if not judged:
        raise ResultsError(f"no rank has {MIN_JUDGEMENTS} judgements against rank {top}: judge more pairs with it")
    chosen, failing = _walk(judged, top, margin)
    verdict = _verdict(judged, chosen, failing, top, margin)
    judges = {one.judge for one in judgements}
    runs = [_next_run(judged[failing], margin, len(judges))] if failing and verdict == "undecided" else []
    return Decision(
        rank=None if verdict == "undecided" else chosen,
        fallback_rank=chosen,
        verdict=verdict,
        flags=["one_judge"] if len(judges) == 1 else [],
        sentence=_sentence(verdict, chosen, top, judged, margin, failing),
        next_run=runs[0].sentence if runs else "Nothing more is needed at this margin.",
        metric=METRIC,
        higher_is_better=True,
        margin=margin,
        reference_rank=top,
        confidence=CONFIDENCE,
        learning_rate=None,
        staircase=_staircase(judged, top),
        ranks=_evidence(judged, top, margin),
        basis="items and seeds" if len(judges) > 1 else "items",
        basis_note=_basis_note(judgements, len(judges)),
        next_runs=runs,
    )


def _walk(judged: Mapping[int, _Judged], top: int, margin: float) -> tuple[int, int | None]:
    """`(smallest rank that holds, first rank below it that does not)`; None where all hold."""
    chosen = top
    for rank in descending(judged, top):
        if not judged[rank].holds(margin):
            return chosen, rank
        chosen = rank
    return chosen, None


def _verdict(judged: Mapping[int, _Judged], chosen: int, failing: int | None, top: int, margin: float) -> Verdict:
    if failing is None:
        return "flat"
    if judged[failing].holds(margin) is None:
        return "undecided"
    return "saturated" if chosen != top else "rising"


def _all(judgements: Sequence[Judgement], top: int) -> dict[int, _Judged]:
    found: dict[int, list[Judgement]] = {}
    for one in judgements:
        if top in (one.rank_a, one.rank_b):
            found.setdefault(one.rank_b if one.rank_a == top else one.rank_a, []).append(one)
    return {rank: _Judged(rank, _worse(own, rank)) for rank, own in sorted(found.items()) if len(own) >= MIN_JUDGEMENTS}


def _worse(own: Sequence[Judgement], rank: int) -> Estimate:
    scores = [EVEN - one.score_of(rank) for one in own]
    return clustered_mean(scores, [one.prompt for one in own], [one.judge for one in own])


def _evidence(judged: Mapping[int, _Judged], top: int, margin: float) -> list[RankEvidence]:
    rows = [
        RankEvidence(
            rank=top,
            value=EVEN,
            low=EVEN,
            high=EVEN,
            difference=0.0,
            difference_low=0.0,
            difference_high=0.0,
            non_inferior=True,
        )
    ]
    return sorted([*rows, *(_row(one, margin) for one in judged.values())], key=lambda one: one.rank)


def _row(one: _Judged, margin: float) -> RankEvidence:
    low, high = (EVEN - one.worse.bound(level) for level in reversed(two_sided(CONFIDENCE)))
    return RankEvidence(
        rank=one.rank,
        value=EVEN - one.worse.mean,
        low=max(0.0, low),
        high=min(1.0, high),
        difference=one.worse.mean,
        difference_low=one.low,
        difference_high=one.high,
        non_inferior=one.holds(margin),
        seeds=max(1, one.worse.seeds),
    )


def _staircase(judged: Mapping[int, _Judged], top: int) -> list[StaircaseStep]:
    steps, threshold = [StaircaseStep(margin=0.0, rank=top)], 0.0
    for rank in descending(judged, top):
        threshold = max(threshold, judged[rank].high)
        if threshold == steps[-1].margin:
            steps.pop()
        steps.append(StaircaseStep(margin=threshold, rank=rank))
    return steps


def _sentence(
    verdict: Verdict, chosen: int, top: int, judged: Mapping[int, _Judged], margin: float, other: int | None
) -> str:
    if verdict == "undecided":
        assert other is not None
        best = f"rank {chosen} is enough" if chosen != top else f"rank {top} is the reference"
        return f"Cannot tell: {best}, and the judgements cannot tell whether rank {other} is: {_rate(judged[other])}, margin {margin:g}."
    if verdict == "rising":
        assert other is not None
        return f"Rank {top} is needed: rank {other} is worse, {_rate(judged[other])}, margin {margin:g}."
    held = f"Rank {chosen} is enough: against rank {top}, {_rate(judged[chosen])}, margin {margin:g}"
    return f"{held}." if other is None else f"{held}; rank {other} is not, {_rate(judged[other])}."


def _rate(one: _Judged) -> str:
    low, high = EVEN - one.high, EVEN - one.low
    return f"it wins {EVEN - one.worse.mean:.0%} (95% bounds {low:.0%} to {high:.0%}, ties as halves)"


def _basis_note(judgements: Sequence[Judgement], judges: int) -> str:
    prompts = len({one.prompt for one in judgements})
    whose = (
        "the judges are a sample of more" if judges > 1 else "other judges may differ: the interval is for this judge"
    )
    return f"The intervals are over {prompts} prompts and {judges} judge{'s' if judges > 1 else ''}; {whose}."


def _next_run(one: _Judged, margin: float, judges: int) -> NextRun:
    """How many judgements would settle the rank, if its win rate stays as it is."""
    room = abs(margin - one.worse.mean)
    now = one.worse.examples
    for factor in (2**power for power in range(1, 13)):
        bigger = one.worse.at(now * factor, one.worse.seeds)
        if room and _reach(bigger, one.worse.mean < margin) < room:
            needed = _least(one.worse, now, now * factor, room, one.worse.mean < margin)
            more = math.ceil(needed * max(1, judges))
            return NextRun(
                action="items",
                ranks=[one.rank],
                items=needed,
                sentence=(
                    f"Judge rank {one.rank} on about {needed:,} prompts in place of {now:,} (about {more:,} judgements in all, each by "
                    f"the {'same judge' if judges == 1 else f'{judges} judges'}) to settle it, if its win rate stays as it is."
                ),
            )
    cure = "more judges" if judges > 1 else "another margin"
    return NextRun(
        action="none",
        ranks=[one.rank],
        sentence=f"More prompts alone would not settle rank {one.rank} at this win rate: take {cure}.",
    )


def _reach(found: Estimate, upward: bool) -> float:
    """From the mean to the bound that is tested."""
    return found.bound(CONFIDENCE) - found.mean if upward else found.mean - found.bound(1 - CONFIDENCE)


def _least(found: Estimate, low: int, high: int, room: float, upward: bool) -> int:
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _reach(found.at(middle, found.seeds), upward) < room else (middle, high)
    return high
