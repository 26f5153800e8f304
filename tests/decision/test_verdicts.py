"""The truth table of the rank that leaves an answer undecided."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rightrank.decision.evidence import Comparison
from rightrank.decision.verdicts import inconclusive_rank

ENOUGH, REFUTED, INCONCLUSIVE = True, False, None


def comparison(chosen: int, *, point_reading: bool = False, **non_inferior: bool | None) -> Comparison:
    """Ranks r0, r1, … with their `non_inferior`; r0 is the base."""
    judged: Any = {int(name[1:]): SimpleNamespace(non_inferior=shown) for name, shown in non_inferior.items()}
    ranks = {rank: None for rank in judged if rank}
    evidence: Any = SimpleNamespace(contenders=ranks, is_point_reading=point_reading)
    return Comparison(evidence, judged, 0.005, chosen)


@pytest.mark.parametrize(
    ("chosen", "shown", "expected"),
    [
        (1, {"r1": ENOUGH, "r4": ENOUGH}, None),  # no lower rank
        (4, {"r2": REFUTED, "r4": ENOUGH, "r8": ENOUGH}, None),
        (8, {"r2": ENOUGH, "r4": REFUTED, "r8": ENOUGH}, None),
        (8, {"r2": REFUTED, "r4": INCONCLUSIVE, "r8": ENOUGH}, 4),  # below the largest tried
        (8, {"r4": INCONCLUSIVE, "r8": ENOUGH, "r16": ENOUGH}, None),  # within a factor of two
        (8, {"r2": REFUTED, "r4": INCONCLUSIVE, "r8": ENOUGH, "r16": ENOUGH}, None),
        (8, {"r2": INCONCLUSIVE, "r4": INCONCLUSIVE, "r8": ENOUGH, "r16": ENOUGH}, 2),
        (8, {"r2": ENOUGH, "r4": INCONCLUSIVE, "r8": ENOUGH, "r16": ENOUGH}, 4),
        (16, {"r4": INCONCLUSIVE, "r16": ENOUGH, "r64": ENOUGH}, 4),  # more than a factor of two below
        (4, {"r0": INCONCLUSIVE, "r2": REFUTED, "r4": ENOUGH, "r8": ENOUGH}, 0),
        (4, {"r0": REFUTED, "r2": REFUTED, "r4": ENOUGH, "r8": ENOUGH}, None),
    ],
)
def test_the_rank_that_leaves_the_answer_undecided(
    chosen: int, shown: dict[str, bool | None], expected: int | None
) -> None:
    assert inconclusive_rank(comparison(chosen, **shown)) == expected
    assert inconclusive_rank(comparison(chosen, point_reading=True, **shown)) is None
