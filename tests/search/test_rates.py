"""The walk over learning rates ends at a rate that is better than its neighbours, whatever diverges."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightrank.search.rates import RATES, choose_best_rate, choose_start_rates, find_next_rate

ALL_LOSSES = st.lists(st.one_of(st.floats(0, 10), st.just(math.inf)), min_size=len(RATES), max_size=len(RATES))
STARTS = st.sampled_from([choose_start_rates(count) for count in (10**8, 10**10, None)])


def walk(losses: Mapping[float, float], start: tuple[float, float]) -> list[float]:
    """Return the rates in the order in which they are trained."""
    visited = list(start)
    while True:
        rate = find_next_rate({rate: losses[rate] for rate in visited}, RATES)
        if rate is None:
            return visited
        visited.append(rate)


@pytest.mark.parametrize(
    ("num_parameters", "start"),
    [(17_000_000, (1e-3, 3e-3)), (999_999_999, (1e-3, 3e-3)), (10**9, (3e-4, 1e-3)), (70 * 10**9, (3e-4, 1e-3))],
)
def test_the_walk_starts_lower_from_a_billion_parameters_on(num_parameters: int, start: tuple[float, float]) -> None:
    assert choose_start_rates(num_parameters) == start


def test_a_model_of_unknown_size_counts_as_a_large_one() -> None:
    assert choose_start_rates(None) == choose_start_rates(10**10)


@given(ALL_LOSSES, STARTS)
def test_the_walk_ends_beside_worse_rates_or_at_an_end(values: list[float], start: tuple[float, float]) -> None:
    losses = dict(zip(RATES, values, strict=True))
    visited = walk(losses, start)
    best = choose_best_rate({rate: losses[rate] for rate in visited})
    index = RATES.index(best)
    for neighbour in RATES[max(0, index - 1) : index + 2]:
        assert neighbour in visited
        assert (losses[best], best) <= (losses[neighbour], neighbour)
    assert len(set(visited)) == len(visited)
    indices = sorted(map(RATES.index, visited))
    assert indices == list(range(indices[0], indices[-1] + 1))  # no gap


@given(ALL_LOSSES.map(sorted), STARTS)
def test_a_loss_that_rises_with_the_rate_leads_to_the_lowest_rate(
    values: list[float], start: tuple[float, float]
) -> None:
    visited = walk(dict(zip(RATES, values, strict=True)), start)
    assert min(visited) == RATES[0]
    assert max(visited) == start[1]


@given(st.lists(st.floats(0, 10), min_size=len(RATES), max_size=len(RATES), unique=True), STARTS)
def test_a_single_minimum_is_found_with_one_step_more_than_its_distance(
    values: list[float], start: tuple[float, float]
) -> None:
    """In a loss that falls to a minimum and rises after it, the walk finds the minimum and trains one rate beyond it."""
    ordered = sorted(values)
    for minimum in range(len(RATES)):
        left = sorted(ordered[1 : minimum + 1], reverse=True)
        losses = dict(zip(RATES, [*left, ordered[0], *ordered[minimum + 1 :]], strict=True))
        visited = walk(losses, start)
        assert choose_best_rate({rate: losses[rate] for rate in visited}) == RATES[minimum]
        distance = min(abs(minimum - RATES.index(rate)) for rate in start)
        assert len(visited) <= 2 + distance + 1


def test_where_both_first_rates_diverge_the_walk_turns_down() -> None:
    losses = {rate: (math.inf if rate > 1e-4 else 2.0) for rate in RATES} | {1e-4: 1.0}
    assert walk(losses, (3e-4, 1e-3)) == [3e-4, 1e-3, 1e-4, 3e-5]


def test_where_the_higher_first_rate_diverges_the_walk_goes_on_below_the_lower_one() -> None:
    losses = dict.fromkeys(RATES, math.inf) | {1e-5: 4.0, 3e-5: 3.0, 1e-4: 2.0, 3e-4: 1.0}
    assert walk(losses, (3e-4, 1e-3)) == [3e-4, 1e-3, 1e-4]


def test_of_equal_rates_the_lower_one_is_chosen() -> None:
    losses = dict.fromkeys(RATES, 1.0)
    assert walk(losses, (1e-3, 3e-3))[-1] == 1e-5
