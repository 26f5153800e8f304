"""Test which rank leaves an answer undecided."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rightrank.decision.evidence import Comparison
from rightrank.decision.verdicts import find_inconclusive_rank

ENOUGH, REFUTED, INCONCLUSIVE = True, False, None


def make_comparison(chosen: int, *, lacks_uncertainty: bool = False, **non_inferior: bool | None) -> Comparison:
    """Make a comparison of ranks r0, r1, … with these values of `non_inferior`; r0 is the base."""
    judged: Any = {int(name[1:]): SimpleNamespace(non_inferior=is_enough) for name, is_enough in non_inferior.items()}
    ranks = {rank: None for rank in judged if rank}
    evidence: Any = SimpleNamespace(contenders=ranks, lacks_uncertainty=lacks_uncertainty)
    return Comparison(evidence, judged, 0.005, chosen)


@pytest.mark.parametrize(
    ("chosen", "non_inferior", "expected"),
    [
        (1, {"r1": ENOUGH, "r4": ENOUGH}, None),  # no lower rank
        (4, {"r2": REFUTED, "r4": ENOUGH, "r8": ENOUGH}, None),
        (8, {"r2": ENOUGH, "r4": REFUTED, "r8": ENOUGH}, None),
        (8, {"r2": REFUTED, "r4": INCONCLUSIVE, "r8": ENOUGH}, 4),  # below the largest rank
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
    chosen: int, non_inferior: dict[str, bool | None], expected: int | None
) -> None:
    assert find_inconclusive_rank(make_comparison(chosen, **non_inferior)) == expected
    assert find_inconclusive_rank(make_comparison(chosen, lacks_uncertainty=True, **non_inferior)) is None
