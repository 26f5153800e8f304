"""The horizon: whether the answer had settled by the end of training, from the evaluations during training.

Low and high ranks learn equally well at first, and lower ranks fall behind earlier. A gap that still grows at the end
indicates that a longer training may need a higher rank.
"""

from __future__ import annotations

from rightrank.decision.contender import Contender
from rightrank.decision.evidence import Evidence
from rightrank.decision.judge import walk_down
from rightrank.records import HorizonNote

MIN_POINTS = 3


def horizon_note(evidence: Evidence, chosen: int, margin: float) -> HorizonNote | None:
    """The step from which the values pick the same rank as at the end, and the late growth of the chosen rank's gap.

    This is a point reading: `margin` and the growth are in the metric's unit. None if all ranks share fewer than
    `MIN_POINTS` evaluations.
    """
    curves = {rank: _curve(contender) for rank, contender in evidence.contenders.items()}
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    if len(steps) < MIN_POINTS:
        return None
    sign = -1.0 if evidence.table.higher_is_better else 1.0
    picks = [_pick({rank: sign * curve[step] for rank, curve in curves.items()}, margin) for step in steps]
    first = len(steps) - 1
    while first > 0 and picks[first - 1] == picks[-1]:
        first -= 1
    growth = None
    if chosen < evidence.reference.rank:
        gaps = [sign * (curves[chosen][step] - curves[evidence.reference.rank][step]) for step in steps]
        growth = gaps[-1] - gaps[len(gaps) // 2 - 1]
    return HorizonNote(steps=steps[-1], holds_from=steps[first], gap_growth=growth)


def _curve(contender: Contender) -> dict[int, float]:
    """Step → mean over seeds, at the steps that all seeds have."""
    by_seed = [dict(cell.points) for cell in contender.cells.values()]
    shared = set.intersection(*(set(points) for points in by_seed))
    return {step: sum(points[step] for points in by_seed) / len(by_seed) for step in shared}


def _pick(losses: dict[int, float], margin: float) -> int:
    """The rule on bare values."""
    reference = min(losses, key=lambda rank: (losses[rank], rank))
    return walk_down(losses, reference, lambda rank: losses[rank] - losses[reference] <= margin)
