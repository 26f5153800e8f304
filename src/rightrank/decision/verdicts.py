"""The verdict and the flags of a decision.

The verdict is the first row that applies, from the most sobering to the plainest:

    ===========  =====================================================================================
    no_gain      the base itself is within the margin of the best adapter
    undecided    a rank that could change the answer is inconclusive (`inconclusive_rank`), or a larger
                 rank may be better than the reference by more than the margin (`possible_rival`), or
                 is worse than it without a reason (`unexplained_rank`)
    overfitting  the largest rank is worse than the margin allows on held-out data and better in training
    flat         the smallest rank is chosen, and no rank is shown to be worse than the margin allows
    rising       the largest rank is chosen, and every smaller one is shown to be worse than the margin allows
    saturated    otherwise
    ===========  =====================================================================================

`no_difference` takes the place of `undecided` where the caller wants the smallest rank then (`alike_ranks`).

Where a confidence chose the rank (`Comparison.at_confidence`), the answer is `undecided` if no rank is as probable, and "shown" in the other rows
is "as probable".

In a point reading (`Evidence.is_point_reading`) nothing is inconclusive: ranks are compared by their values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rightrank.decision.comparison import CONFIDENCE, is_within, walk_down
from rightrank.decision.evidence import Comparison, Evidence
from rightrank.decision.table import Contender, ScoreTable, at_checkpoint
from rightrank.schema.decision import CheckpointNote, Grade, MetricAnswer, Verdict
from rightrank.schema.metrics import Checkpoint, default_margin, direction, metric_kind, published_deviation

FALL_IN_MARGINS = 20.0  # below the best; without a further fall at the next rank no published curve has more than 16 (benchmarks/decide)
RISE = 1 / 8  # of a rank's distance from the best, that its neighbour has where results get worse rank by rank


def verdict_of(tested: Comparison) -> Verdict:
    """The first row of the table above that applies."""
    if tested.base_is_enough:
        return "no_gain"
    if is_open(tested) or unexplained_rank(tested) is not None:
        return "undecided"
    if overfits(tested):
        return "overfitting"
    if tested.chosen == tested.ranks[0] and not any(tested.is_worse(rank) for rank in tested.ranks):
        return "flat"
    if rises(tested) and all(tested.is_worse(rank) for rank in tested.ranks[:-1]):
        return "rising"
    return "saturated"


def inconclusive_rank(tested: Comparison) -> int | None:
    """The rank (0: the base) that leaves the answer undecided; None where the answer is known within a factor of two.

    None where a confidence chose the rank. The base does if it is inconclusive. Otherwise, with "next" the next lower rank than the chosen one, and "far" the highest
    rank below half of the chosen one:

        ================  ========================  ================  ========
        next              the chosen rank           far               returns
        ================  ========================  ================  ========
        none, or refuted  any                       any               None
        inconclusive      is the largest tried      any               next
        inconclusive      is not the largest tried  none, or refuted  None
        inconclusive      is not the largest tried  inconclusive      far
        inconclusive      is not the largest tried  shown enough      next
        ================  ========================  ================  ========

    So a rank within a factor of two below the chosen one may stay inconclusive: too much rank costs memory, too little
    costs quality. Below the largest rank it may not, since then it is unknown whether the curve still rises.
    """
    if tested.evidence.is_point_reading or tested.confidence is not None:
        return None
    compared, below = tested.by_rank, tested.next_lower
    if 0 in compared and compared[0].non_inferior is None:
        return 0
    if below is None or compared[below].non_inferior is False:
        return None
    if tested.chosen == tested.ranks[-1]:
        return below
    far = max((rank for rank in tested.ranks if 2 * rank < tested.chosen), default=None)
    if far is None or compared[far].non_inferior is False:
        return None
    return far if compared[far].non_inferior is None else below


def is_open(tested: Comparison) -> bool:
    """Whether the trainings as they are leave the answer undecided."""
    if tested.confidence is not None:
        return is_unlikely(tested)
    return inconclusive_rank(tested) is not None or possible_rival(tested) is not None


def is_unlikely(tested: Comparison) -> bool:
    """Whether no rank has the probability that was asked for."""
    return tested.confidence is not None and tested.likely(tested.chosen) < tested.confidence


def grade_of(tested: Comparison, verdict: Verdict) -> Grade | None:
    """How far the answer is known: shown by its 95% bounds, likely, or not; None where one number a rank is all there is."""
    if verdict in ("undecided", "no_difference"):
        return "cannot tell"
    if tested.evidence.is_point_reading:
        return None
    smallest = tested.reference.rank if shown_rank(tested) is None else shown_rank(tested)
    if verdict == "no_gain":
        is_shown = tested.by_rank[0].non_inferior is True
    else:
        is_shown = smallest is not None and smallest <= tested.chosen and _better_above(tested) is None
    return "shown" if is_shown and not tested.is_indication else "likely"


def alike_ranks(tested: Comparison) -> list[int]:
    """The ranks that their own difference from the best does not show to be worse, ascending; none where the base may be as good.

    The bound is the plain one, which says "worse" a little too soon after the choice of the best: an answer that takes the smallest of
    these ranks errs upward.
    """
    if 0 in tested.by_rank and tested.by_rank[0].non_inferior is not False:
        return []
    return [rank for rank in tested.ranks if tested.by_rank[rank].difference.bound(1 - CONFIDENCE) <= 0]


def possible_rival(tested: Comparison) -> int | None:
    """The rank that leaves the answer undecided since it may be better (`_better_above`); None in a point reading."""
    return None if tested.evidence.is_point_reading else _better_above(tested)


def shown_rank(tested: Comparison) -> int | None:
    """The smallest rank whose comparison with the reference passed; None without one, or if a higher rank may be better."""
    reference = tested.reference.rank
    smallest = walk_down(tested.by_rank, reference, lambda rank: tested.by_rank[rank].non_inferior is True)
    return None if smallest == reference or _better_above(tested) is not None else smallest


def _better_above(tested: Comparison) -> int | None:
    """The rank above the reference that may be better than it by more than the margin; None if there is none.

    It guards against a low rank that came out best by luck.
    """
    lows = {rank: tested.by_rank[rank].low for rank in tested.ranks if rank > tested.reference.rank}
    better = [rank for rank in lows if not is_within(-lows[rank], tested.margin)]
    return min(better, key=lambda rank: lows[rank], default=None)


def unexplained_rank(tested: Comparison) -> int | None:
    """The smallest rank above the reference that is clearly worse without a reason; None if there is none.

    A larger rank is expected to be about as good. Where one is not, its training went wrong (a learning rate that is too high, an unlucky seed), and it may
    be the best in truth: most answers beside such a rank were too small on twelve long grids (benchmarks/selection/noise_model.json). Or it overfits: then its training values are
    better than the reference's, or the results get worse rank by rank. Two seeds that show it by their bounds settle it too, unless it fell by
    `FALL_IN_MARGINS` at the lowest of its learning rates. One number a rank has to fall as far.
    """
    larger = [rank for rank in tested.ranks if rank > tested.reference.rank]
    for rank in larger:
        compared = tested.by_rank[rank]
        has_failed = not has_lower_rate(tested, rank) and not is_within(
            compared.difference.mean, FALL_IN_MARGINS * tested.margin
        )
        is_shown = compared.non_inferior is False and compared.difference.seeds > 1
        is_settled = (tested.evidence.is_point_reading or is_shown) and not has_failed
        is_explained = _learns_more(tested, rank) or _continues_a_rise(tested, larger, rank)
        if tested.is_clearly_worse(rank) and not is_settled and not is_explained:
            return rank
    return None


def has_lower_rate(tested: Comparison, rank: int) -> bool:
    """Whether a lower learning rate than the rank's best was tried too."""
    return tested.evidence.table.tried_learning_rates(rank)[0] < tested.evidence.contenders[rank].learning_rate


def _continues_a_rise(tested: Comparison, larger: Sequence[int], rank: int) -> bool:
    """Whether the larger rank next to this one is worse too, as where ranks overfit: by a share of it below, by more above; not where the base is better."""
    worse = {other: tested.by_rank[other].difference.mean for other in tested.by_rank}
    if 0 in worse and worse[rank] > worse[0]:
        return False
    place = larger.index(rank)
    below, above = larger[max(place - 1, 0) : place], larger[place + 1 : place + 2]
    return any(worse[other] >= RISE * worse[rank] for other in below) or any(
        worse[other] >= (1 + RISE) * worse[rank] for other in above
    )


def rises(tested: Comparison) -> bool:
    """Whether the top rank's mean is better than every smaller one's by more than the margin and its stated deviation."""
    *smaller, top = tested.ranks
    if tested.reference.rank != top:
        return False
    stated = [cell.deviation or 0.0 for cell in tested.reference.cells.values()]
    threshold = max(tested.margin, *stated) if tested.evidence.basis == "std" else tested.margin
    return all(not is_within(tested.by_rank[rank].difference.mean, threshold) for rank in smaller)


def overfits(tested: Comparison) -> bool:
    """Whether the largest rank is worse than the margin allows on held-out data, and better than the reference in training."""
    top = tested.ranks[-1]
    return top != tested.reference.rank and tested.is_worse(top) and _learns_more(tested, top)


def _learns_more(tested: Comparison, rank: int) -> bool:
    """Whether the rank is better than the reference in training."""
    ours, theirs = _train_value(tested.evidence.contenders[rank]), _train_value(tested.reference)
    return ours is not None and theirs is not None and ours < theirs


def _train_value(contender: Contender) -> float | None:
    """The mean training loss. Lower is better, whatever the metric."""
    values = [cell.train_value for cell in contender.cells.values() if cell.train_value is not None]
    return float(np.mean(values)) if values else None


def flags_of(
    tested: Comparison,
    verdict: Verdict,
    beside: Sequence[MetricAnswer] = (),
    checkpoints: CheckpointNote | None = None,
) -> list[str]:
    """The flags in a fixed order. Each has an entry in docs/reference/decision.md.

    Args:
        beside: the answers by other metrics, which need no comparison of bare values here.
    """
    evidence, top = tested.evidence, tested.ranks[-1]
    answer = {tested.chosen, tested.reference.rank}
    growth = _late_growth(tested) or 0.0
    named = [set(cell.others) for contender in evidence.contenders.values() for cell in contender.cells.values()]
    others = set.intersection(*named) - {
        answer.metric
        for answer in beside
        if any(row.non_inferior is not None for row in answer.ranks if row.rank != answer.reference_rank)
    }
    raised = {
        "underpowered": underpowered(tested, verdict),
        "rising": verdict == "undecided"
        and rises(tested)
        and all(tested.by_rank[rank].low > 0 for rank in tested.ranks if rank < top),
        "lr_edge": any(evidence.is_at_edge(rank) for rank in answer),
        "unstable": any(evidence.table.missing.values()),
        "larger_rank_worse": unexplained_rank(tested) is not None,
        "unequal_length": len(lengths(evidence)) > 1,
        "collapsed": evidence.table.collapsed > 0,
        "one_seed": tested.is_indication,
        "winner_gap": max(evidence.contenders[rank].gap for rank in answer) > tested.margin / 2,
        "metric_conflict": any(answer.conflict for answer in beside)
        or any(_conflicts_in(evidence, tested.chosen, name) for name in sorted(others)),
        # the chosen rank's gap exceeds the margin if it grows by as much again
        "may_be_capacity_limited": growth > 0
        and not is_within(tested.by_rank[tested.chosen].difference.mean + growth, tested.margin),
        "checkpoint_matters": checkpoints is not None and checkpoints.matters,
    }
    return [flag for flag, raise_it in raised.items() if raise_it]


def underpowered(tested: Comparison, verdict: Verdict) -> bool:
    """Whether the data can't show the answer at 95% confidence."""
    if not tested.evidence.is_point_reading:
        return verdict == "undecided"
    compared, below = tested.by_rank, tested.next_lower
    settled = compared[tested.chosen].non_inferior is True and (below is None or compared[below].non_inferior is False)
    return tested.evidence.basis == "values" or not settled


def lengths(evidence: Evidence) -> set[int]:
    """The different numbers of steps of the trainings that are compared, where the table states them."""
    return {cell.steps for contender in evidence.contenders.values() for cell in contender.cells.values() if cell.steps}


def _conflicts_in(evidence: Evidence, chosen: int, name: str) -> bool:
    """Whether by another metric, of which only values are known, the chosen rank is clearly worse than the best."""
    higher = direction(name)
    if higher is None:
        return False
    kind = metric_kind(name, higher)
    sign = -1.0 if higher else 1.0
    means = {
        rank: float(np.mean([cell.others[name] for cell in contender.cells.values()]))
        for rank, contender in evidence.contenders.items()
    }
    values = list(means.values())
    best = min(sign * value for value in values)
    if kind == "perplexity":
        return math.log(means[chosen] / best) > default_margin("token_loss", best, values) if best > 0 else False
    noise = 2 * math.sqrt(2) * published_deviation(kind, best, values)
    return sign * means[chosen] - best > max(default_margin(kind, best, values), noise)


MIN_POINTS = 3


def _late_growth(tested: Comparison) -> float | None:
    """The change of the chosen rank's gap to the reference over the second half of its training, in the metric's unit.

    None for the reference, and where the two share fewer than `MIN_POINTS` evaluations.
    """
    if tested.chosen >= tested.reference.rank:
        return None
    curves = [_curve(contender) for contender in (tested.evidence.contenders[tested.chosen], tested.reference)]
    steps = sorted(curves[0].keys() & curves[1].keys())
    if len(steps) < MIN_POINTS:
        return None
    sign = -1.0 if tested.evidence.table.higher_is_better else 1.0
    gaps = [sign * (curves[0][step] - curves[1][step]) for step in steps]
    return gaps[-1] - gaps[len(gaps) // 2 - 1]


def checkpoint_note(table: ScoreTable, evidence: Evidence, used: Checkpoint, margin: float) -> CheckpointNote | None:
    """The ranks that the values pick at the last and at the best evaluation; None without evaluations during the training.

    Args:
        evidence: of the table at the checkpoint `used`.
        margin: in the oriented unit.
    """
    if not any(cell.points for (rank, _, _), cell in table.cells.items() if rank > 0):
        return None
    other: Checkpoint = "best" if used == "last" else "last"
    picks = {used: _pick(evidence, margin), other: _pick(Evidence(at_checkpoint(table, other)), margin)}
    return CheckpointNote(used=used, last=picks["last"], best=picks["best"])


def _pick(evidence: Evidence, margin: float) -> int:
    """The rule on bare values."""
    losses = {rank: contender.fair_loss for rank, contender in evidence.contenders.items()}
    reference = min(losses, key=lambda rank: (losses[rank], rank))
    return walk_down(losses, reference, lambda rank: is_within(losses[rank] - losses[reference], margin))


def _curve(contender: Contender) -> dict[int, float]:
    """Step → mean over seeds, at the steps that all seeds have."""
    by_seed = [{point.step: point.value for point in cell.points} for cell in contender.cells.values()]
    shared = set.intersection(*(set(points) for points in by_seed))
    return {step: sum(points[step] for points in by_seed) / len(by_seed) for step in shared}


def names(ranks: Sequence[int]) -> str:
    """`rank 4`, `ranks 4, 16 and 64`."""
    *first, last = map(str, ranks)
    return f"ranks {', '.join(first)} and {last}" if first else f"rank {last}"
