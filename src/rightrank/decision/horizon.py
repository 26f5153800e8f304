"""Whether the ranks' order had settled: from the evaluations along the trainings.

Low and high ranks run together at first; low ranks fall off later, the later the larger they are. So a gap that
still grows at the end says that a longer training may need more rank than this one did.
"""

from __future__ import annotations

from rightrank.decision.evidence import Contender, Evidence
from rightrank.decision.judge import walk_down
from rightrank.records import HorizonNote

LEAST_POINTS = 3


def horizon_note(evidence: Evidence, chosen: int, margin: float) -> HorizonNote | None:
    """From which step on the same rank would have been read off, and how the chosen rank's gap moved at the end.

    Read off the means as measured: `margin` and the growth are in the metric's unit. None where fewer than three
    evaluations are shared by all ranks.
    """
    curves = {rank: _curve(contender) for rank, contender in evidence.contenders.items()}
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    if len(steps) < LEAST_POINTS:
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
    """The point reading of the rule."""
    reference = min(losses, key=lambda rank: (losses[rank], rank))
    return walk_down(losses, reference, lambda rank: losses[rank] - losses[reference] <= margin)
