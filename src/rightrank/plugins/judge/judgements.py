"""Rows of judgements, `prompt, rank_a, rank_b, outcome[, judge]`, of which every error names the row; and the decision on them:
win rates against the reference, with intervals over prompts and judges."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from rightrank.data.rows import Row
from rightrank.decision.comparison import (
    CONFIDENCE,
    RULE_OF_THREE,
    TWO_SIDED,
    Bounds,
    Estimate,
    descending,
    examples_needed,
    walk_down,
)
from rightrank.schema.decision import Decision, NextRun, RankEvidence, StaircaseStep, Verdict
from rightrank.schema.errors import ResultsError, quoted
from rightrank.schema.trials import Floats, Record, Whole

Outcome: TypeAlias = Literal["a", "b", "tie"]
SCORES: dict[str, float] = {"a": 1.0, "tie": 0.5, "b": 0.0}  # by outcome, of rank_a


class Judgement(Record):
    """One judge's choice between the answers of two ranks to one prompt."""

    prompt: str
    rank_a: Whole
    rank_b: Whole
    outcome: Outcome
    judge: str

    def score_of(self, rank: int) -> float:
        """1 for a win of `rank`, 1/2 for a tie, 0 for a loss."""
        return SCORES[self.outcome] if rank == self.rank_a else 1 - SCORES[self.outcome]


NEEDED = ("prompt", "rank_a", "rank_b", "outcome")
ONE_JUDGE = "judge"


def judgements_of(rows: Iterable[Row]) -> tuple[list[Judgement], list[str]]:
    """`(judgements, how the rows were understood)`.

    Raises:
        ResultsError: a missing column, a rank that is none, an outcome besides a, b and tie, or two rows in which one
            judge chose differently between the same answers.
    """
    seen: dict[tuple[str, int, int, str], tuple[float, str]] = {}
    judgements: list[Judgement] = []
    repeated = 0
    for row in rows:
        judgement = _judgement(row)
        low, high = sorted((judgement.rank_a, judgement.rank_b))
        key, score = (judgement.prompt, low, high, judgement.judge), judgement.score_of(low)
        before = seen.get(key)
        if before is not None and before[0] != score:
            raise ResultsError(
                f"{row.where} contradicts {before[1]}: {judgement.judge!r} chose differently between ranks {low} and {high} on the same "
                f"prompt ({quoted(judgement.prompt)}); keep one of the rows, or name two judges"
            )
        if before is not None:
            repeated += 1
            continue
        seen[key] = score, row.where
        judgements.append(judgement)
    judges, prompts = {judgement.judge for judgement in judgements}, {judgement.prompt for judgement in judgements}
    understood = [
        f"{len(judgements)} judgements of {len(prompts)} prompts by {len(judges)} judge{'s' if len(judges) != 1 else ''}"
    ]
    if repeated:
        understood.append(f"{repeated} rows repeat another and were left out")
    return judgements, understood


def _judgement(row: Row) -> Judgement:
    missing = [name for name in NEEDED if row.fields.get(name) in (None, "")]
    if missing:
        raise ResultsError(
            f"{row.where}: no {missing[0]}; judgements have the columns {', '.join(NEEDED)} and, if there are several, judge"
        )
    ranks = [_rank(row, name) for name in ("rank_a", "rank_b")]
    if ranks[0] == ranks[1]:
        raise ResultsError(f"{row.where}: rank_a and rank_b are both {ranks[0]}; a judgement is between two ranks")
    outcome = str(row.fields["outcome"]).strip().lower()
    if outcome not in SCORES:
        raise ResultsError(f"{row.where}: outcome is {quoted(outcome)}; give a, b or tie")
    judge = row.fields.get("judge")
    return Judgement.model_validate(
        {
            "prompt": str(row.fields["prompt"]),
            "rank_a": ranks[0],
            "rank_b": ranks[1],
            "outcome": outcome,
            "judge": ONE_JUDGE if judge in (None, "") else str(judge),
        }
    )


def _rank(row: Row, name: str) -> int:
    value = row.fields[name]
    try:
        rank = int(str(value))
    except ValueError:
        rank = 0
    if rank < 1:
        raise ResultsError(f"{row.where}: {name} is {quoted(value)}; give a whole number from 1")
    return rank


def clustered_mean(scores: Sequence[float], prompts: Sequence[Hashable], judges: Sequence[Hashable]) -> Estimate:
    """The mean over judgements, its prompts as `examples` and its judges as `seeds`.

    With one judge the interval is over prompts alone. Where all scores are equal, nothing varies and the rule of three is used: the
    one-sided 95% bound lies 3/prompts away.

    Args:
        scores: [judgements] 1 for a win, 1/2 for a tie, 0 for a loss.
        prompts: [judgements] the prompt of each.
        judges: [judgements] the judge of each.
    """
    values = np.asarray(scores, dtype=np.float64)
    count = len(values)
    residuals = values - values.mean()
    by_prompt, by_judge = _sums(residuals, prompts), _sums(residuals, judges)
    by_both = _sums(residuals, list(zip(prompts, judges, strict=True)))
    of_prompts = _variance(by_prompt, count)
    if of_prompts == 0.0:
        of_prompts = (RULE_OF_THREE / len(by_prompt)) ** 2
    of_judges = _variance(by_judge, count) if len(by_judge) > 1 else 0.0
    both = min(_variance(by_both, count), of_prompts, of_judges)
    spread = float(np.mean(by_prompt**2))
    skewness = float(np.mean(by_prompt**3)) / spread**1.5 if spread > 0 else 0.0
    judges_degrees = max(1.0, len(by_judge) - 1.0)
    return Estimate(
        float(values.mean()), of_prompts, of_judges, both, len(by_prompt), len(by_judge), judges_degrees, skewness
    )


def _sums(residuals: Floats, names: Sequence[Hashable]) -> Floats:
    places: dict[Hashable, int] = {}
    index = np.array([places.setdefault(name, len(places)) for name in names])
    sums: Floats = np.bincount(index, weights=residuals, minlength=len(places)).astype(np.float64)
    return sums


def _variance(sums: Floats, count: int) -> float:
    """Of the mean, from the sums of its clusters."""
    clusters = len(sums)
    return float((sums**2).sum()) / count**2 * clusters / max(1, clusters - 1)


METRIC = "win_rate"
WIN_RATE_MARGIN = 0.05
EVEN = 0.5
MIN_JUDGEMENTS = 2  # of a rank against the reference


@dataclass(frozen=True, slots=True)
class _Judged:
    """One rank against the reference; `worse` is 1/2 minus its win rate."""

    worse: Estimate
    bounds: Bounds

    def words(self) -> str:
        low, high = EVEN - self.bounds.high, EVEN - self.bounds.low
        return f"it wins {EVEN - self.worse.mean:.0%} (95% bounds {low:.0%} to {high:.0%}, ties as halves)"


def decide_judged(
    judgements: Sequence[Judgement], margin: float | None = None, reference: int | None = None
) -> Decision:
    """The decision that the judgements support.

    Args:
        judgements: only those of a pair with the reference count.
        margin: how far below 1/2 a win rate may be; None for .05.
        reference: None for the rank that is compared with the most others, the largest of several.

    Raises:
        ResultsError: a margin that is no win rate, or no rank with two judgements against the reference.
    """
    margin = WIN_RATE_MARGIN if margin is None else margin
    if not 0 < margin < EVEN:
        raise ResultsError(f"margin {margin:g} is not allowed: a win rate's margin is above 0 and below 0.5")
    others: dict[int, set[int]] = {}
    for judgement in judgements:
        others.setdefault(judgement.rank_a, set()).add(judgement.rank_b)
        others.setdefault(judgement.rank_b, set()).add(judgement.rank_a)
    top = max(others, key=lambda rank: (len(others[rank]), rank)) if reference is None else reference
    judged = _against(judgements, top)
    if not judged:
        raise ResultsError(f"no rank has {MIN_JUDGEMENTS} judgements against rank {top}: judge more pairs with it")
    chosen = walk_down(judged, top, lambda rank: judged[rank].bounds.is_enough(margin) is True)
    failing = next(iter(descending(judged, chosen)), None)
    verdict, sentence = _answer(judged, chosen, failing, top, margin)
    may_be_better = any(against.bounds.low < -margin for rank, against in judged.items() if rank > top)
    fallback = None if chosen == top or may_be_better else chosen
    winner = min(judged, key=lambda rank: (judged[rank].worse.mean, rank))
    best = winner if judged[winner].worse.mean < 0 else top  # or where none wins more than it loses
    judges, prompts = (
        len({judgement.judge for judgement in judgements}),
        len({judgement.prompt for judgement in judgements}),
    )
    whose = (
        "the judges are a sample of more" if judges > 1 else "other judges may differ: the interval is for this judge"
    )
    runs = [_next_run(failing, judged[failing].worse, margin, judges)] if failing and verdict == "undecided" else []
    return Decision(
        rank=None if verdict == "undecided" else chosen,
        fallback_rank=fallback,
        best_so_far=best if fallback is None else None,
        verdict=verdict,
        flags=["one_judge"] if judges == 1 else [],
        sentence=sentence,
        next_run=runs[0].sentence if runs else "Nothing more is needed at this margin.",
        metric=METRIC,
        higher_is_better=True,
        margin=margin,
        reference_rank=top,
        confidence=CONFIDENCE,
        learning_rate=None,
        staircase=_staircase(judged, top),
        ranks=_evidence(judged, top, margin),
        basis="items and seeds" if judges > 1 else "items",
        basis_note=f"The intervals are over {prompts} prompts and {judges} judge{'s' * (judges > 1)}; {whose}.",
        next_runs=runs,
    )


def _against(judgements: Sequence[Judgement], top: int) -> dict[int, _Judged]:
    """By rank, what was judged between it and the reference."""
    by_rank: dict[int, list[Judgement]] = {}
    for judgement in judgements:
        if top in (judgement.rank_a, judgement.rank_b):
            by_rank.setdefault(judgement.rank_b if judgement.rank_a == top else judgement.rank_a, []).append(judgement)
    judged = {}
    for rank, own in sorted(by_rank.items()):
        if len(own) >= MIN_JUDGEMENTS:
            scores = [EVEN - judgement.score_of(rank) for judgement in own]
            worse = clustered_mean(
                scores, [judgement.prompt for judgement in own], [judgement.judge for judgement in own]
            )
            low, high = max(-EVEN, worse.bound(1 - CONFIDENCE)), min(EVEN, worse.bound(CONFIDENCE))
            judged[rank] = _Judged(worse, Bounds(worse.mean, low, high))
    return judged


def _answer(
    judged: Mapping[int, _Judged], chosen: int, failing: int | None, top: int, margin: float
) -> tuple[Verdict, str]:
    """The verdict and its sentence; `failing` is the first rank below the chosen one that is not shown to be enough."""
    held = f"Rank {chosen} is the reference, and no rank below it was judged"
    if chosen != top:
        held = f"Rank {chosen} is enough: against rank {top}, {judged[chosen].words()}, margin {margin:g}"
    if failing is None:
        return "flat", f"{held}."
    rate = judged[failing].words()
    if judged[failing].bounds.is_enough(margin) is None:
        best = f"rank {chosen} is enough" if chosen != top else f"rank {top} is the reference"
        unknown = f"the judgements cannot tell whether rank {failing} is"
        return "undecided", f"Cannot tell: {best}, and {unknown}: {rate}, margin {margin:g}."
    if chosen == top:
        return "rising", f"Rank {top} is needed: rank {failing} is worse, {rate}, margin {margin:g}."
    return "saturated", f"{held}; rank {failing} is not, {rate}."


def _evidence(judged: Mapping[int, _Judged], top: int, margin: float) -> list[RankEvidence]:
    even = {"value": EVEN, "low": EVEN, "high": EVEN, "difference_low": 0.0, "difference_high": 0.0}
    rows = [RankEvidence(rank=top, difference=0.0, non_inferior=True, **even)]
    for rank, against in judged.items():
        low, high = (EVEN - against.worse.bound(level) for level in reversed(TWO_SIDED))
        rows.append(
            RankEvidence(
                rank=rank,
                value=EVEN - against.worse.mean,
                low=max(0.0, low),
                high=min(1.0, high),
                difference=against.worse.mean,
                difference_low=against.bounds.low,
                difference_high=against.bounds.high,
                non_inferior=against.bounds.is_enough(margin),
                seeds=max(1, against.worse.seeds),
            )
        )
    return sorted(rows, key=lambda row: row.rank)


def _staircase(judged: Mapping[int, _Judged], top: int) -> list[StaircaseStep]:
    steps, threshold = [StaircaseStep(margin=0.0, rank=top)], 0.0
    for rank in descending(judged, top):
        threshold = max(threshold, judged[rank].bounds.high)
        if threshold == steps[-1].margin:
            steps.pop()
        steps.append(StaircaseStep(margin=threshold, rank=rank))
    return steps


def _next_run(rank: int, worse: Estimate, margin: float, judges: int) -> NextRun:
    """How many judgements would settle the rank, if its win rate stays as it is."""
    needed = examples_needed(worse, margin)
    if needed is None:
        cure = "more judges" if judges > 1 else "another margin"
        sentence = f"More prompts alone would not settle rank {rank} at this win rate: take {cure}."
        return NextRun(action="none", ranks=[rank], sentence=sentence)
    each = "same judge" if judges == 1 else f"{judges} judges"
    sentence = (
        f"Judge rank {rank} on about {needed:,} prompts in place of {worse.examples:,} (about {needed * max(1, judges):,} "
        f"judgements in all, each by the {each}) to settle it, if its win rate stays as it is."
    )
    return NextRun(action="items", ranks=[rank], items=needed, sentence=sentence)
