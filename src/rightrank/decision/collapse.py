"""Collapses of trainings by reinforcement learning: a held-out value that falls far below its own best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rightrank.decision.table import best_point
from rightrank.schema.trials import EvalPoint

DROP_IN_MARGINS = 2.5  # the fall that counts as a collapse: five points at a margin of two
MIN_LOOKS_TO_END = 3  # the best one, and two far below it
SURE_DEVIATIONS = 3.0  # of the paired fall over examples: the best of several looks is optimistic by about two


def collapse_of(points: Sequence[EvalPoint], drop: float, higher_is_better: bool = True) -> dict[str, Any] | None:
    """The collapse that the looks of a training show at their end, as fields of `TrialCollapsed`; None if there is none.

    The last value is worse than the best one by more than `drop` and, where both looks have scores of the same examples, by
    more than `SURE_DEVIATIONS` standard errors of their paired difference.
    """
    if len(points) < 2:
        return None
    ordered = sorted(points, key=lambda point: point.step)
    best, last = best_point(ordered, higher_is_better), ordered[-1]
    fall = (best.value - last.value) * (1.0 if higher_is_better else -1.0)
    left, right = best.item_scores or [], last.item_scores or []
    noise = 0.0  # the standard error of the mean paired difference
    if len(left) == len(right) >= 2:
        noise = float(np.std(np.subtract(left, right), ddof=1) / np.sqrt(len(left)))
    if fall <= max(drop, SURE_DEVIATIONS * noise):
        return None
    told = f"the held-out value fell from {best.value:.4g} at step {best.step} to {last.value:.4g} at step {last.step}"
    at = {"step": last.step, "value": last.value, "best_step": best.step, "best_value": best.value}
    return {**at, "reason": told}


def should_stop_early(points: Sequence[EvalPoint], drop: float, higher_is_better: bool = True) -> bool:
    """Whether a training has collapsed so far that further steps are not worth their cost.

    Its last two looks are both far below the best, and below the middle between the first look and the best. Runs recover from
    lesser falls: a published one from .83 by way of .51 and .47 to .82 (benchmarks/rl).
    """
    ordered = sorted(points, key=lambda point: point.step)
    if len(ordered) < MIN_LOOKS_TO_END:
        return False
    middle = (ordered[0].value + best_point(ordered, higher_is_better).value) / 2
    below = [(middle - point.value) * (1.0 if higher_is_better else -1.0) > 0 for point in ordered[-2:]]
    both = (ordered, ordered[:-1])
    return all(below) and all(collapse_of(looks, drop, higher_is_better) is not None for looks in both)
