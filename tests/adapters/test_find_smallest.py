"""Test the search for the smallest adapter within the margin on random scores."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rightrank.adapters.find_smallest import find_smallest
from rightrank.decision.adapter import Criterion, ReferenceComparison, ScoredAdapter

RANKS = (1, 2, 4, 8, 16)


@given(st.lists(st.one_of(st.none(), st.floats(-0.05, 0.1)), min_size=4, max_size=4), st.integers(0, 99), st.booleans())
def test_the_search_stops_at_the_first_rank_that_is_not_within_the_margin(
    losses: list[float | None], seed: int, is_permuted: bool
) -> None:
    """Give each lower rank a mean difference, or no adapter. The order of the examples changes nothing."""
    criterion, draw = Criterion("loss", higher_is_better=False, margin=0.03), np.random.default_rng(seed)
    top = draw.normal(2, 0.3, 40)
    scores = {16: top} | {
        rank: top + difference + draw.normal(0, 0.01, 40)
        for rank, difference in zip(RANKS, losses, strict=False)
        if difference is not None
    }
    order = draw.permutation(40) if is_permuted else np.arange(40)
    evaluated: list[int] = []

    def evaluate(rank: int, examples: np.ndarray = order) -> ScoredAdapter:
        evaluated.append(rank)
        values = scores[rank][examples].tolist()
        return ScoredAdapter.from_scores(str(rank), rank, float(np.mean(values)), (values, [1.0] * 40), criterion)

    smallest = find_smallest(16, [*RANKS, 32], lambda rank: rank if rank in scores else None, evaluate, criterion)
    every = {str(rank): evaluate(rank, np.arange(40)) for rank in scores}
    comparison = ReferenceComparison(every["16"], every, criterion)
    is_within = {rank: comparison.build_candidate(every[str(rank)]).is_within_margin for rank in scores}
    expected, tested = 16, [16]
    for rank in sorted(scores, reverse=True)[1:]:
        tested.append(rank)
        if not is_within[rank]:
            break
        expected = rank
    assert (smallest.adapter, smallest.answer.rank) == (expected, expected)
    assert evaluated[: len(tested)] == tested == [candidate.rank for candidate in smallest.answer.candidates]
    assert len(evaluated) == len(tested) + len(scores)
    assert smallest.answer.trained_rank == 16
