"""Find the smallest adapter within the margin of the adapter that it is truncated from.

`select`, `resize --data`, the callbacks and the custom trainer differ only in how they truncate and evaluate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from rightrank.decision.adapter import Criterion, ReferenceComparison, ScoredAdapter, build_truncation_answer
from rightrank.schema.results import AdapterAnswer

Adapter = TypeVar("Adapter")


@dataclass(frozen=True, slots=True)
class SmallestAdapterAnswer(Generic[Adapter]):
    """The smallest adapter within the margin, with every adapter that was evaluated on the way."""

    adapter: Adapter
    answer: AdapterAnswer
    scored: list[ScoredAdapter]  # the largest adapter first, then its truncations by descending rank
    base: ScoredAdapter | None  # the zero update, if there is one


def find_smallest(
    adapter: Adapter,
    ranks: Iterable[int],
    truncate: Callable[[int], Adapter | None],
    evaluate: Callable[[Adapter], ScoredAdapter],
    criterion: Criterion,
) -> SmallestAdapterAnswer[Adapter]:
    """Truncate an adapter downward until a rank is not shown to be within the margin of the adapter itself.

    Args:
        ranks: the candidates; those that are not below the adapter's own rank are left out.
        truncate: returns the adapter at a rank, or None if there is none, which is no evidence against the rank. Rank 0 is the adapter
            with a zero update, from which the gain is measured; without it the margin is one in the metric's unit.
        evaluate: scores an adapter on the same held-out examples as all others.
        criterion: the metric and the margin.
    """
    top, zero = evaluate(adapter), truncate(0)
    base = None if zero is None else evaluate(zero)
    chosen, chosen_adapter, scored = top, adapter, {top.name: top}
    comparison = ReferenceComparison(top, scored, criterion, base)
    for rank in sorted({rank for rank in ranks if 0 < rank < top.rank}, reverse=True):
        truncated = truncate(rank)
        if truncated is None:
            continue
        candidate = evaluate(truncated)
        scored[candidate.name] = candidate
        if not comparison.build_candidate(candidate).is_within_margin:
            break
        chosen, chosen_adapter = candidate, truncated
    truncations = list(scored.values())[1:]
    answer = build_truncation_answer(chosen, truncations, comparison)
    return SmallestAdapterAnswer(chosen_adapter, answer, [top, *truncations], base)
