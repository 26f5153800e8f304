"""Properties of ranks, scales and sizes of adapters."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightrank.adapters.rank_math import (
    SERVER_RANKS,
    build_exact_pattern,
    compute_equal_scale_alphas,
    compute_equivalent_rank,
    compute_slot_bytes,
    convert_scaling,
    find_server_rank,
    format_rank,
    format_rank_change,
    format_slot,
    get_pattern_value,
)
from rightrank.adapters.resize import list_candidate_ranks
from rightrank.schema.errors import SettingsError

RANKS, ALPHAS = st.integers(1, 600), st.floats(0.5, 1024)
NAMES = st.lists(st.sampled_from(["layers.0", "vision", "q_proj", "v_proj", "1"]), min_size=1, max_size=3).map(".".join)


@given(st.dictionaries(NAMES, RANKS, min_size=1), RANKS)
def test_a_pattern_gives_each_module_its_rank(ranks: dict[str, int], default: int) -> None:
    """Also where a name ends in another one, to which PEFT would match it."""
    pattern = build_exact_pattern(ranks, default, ranks)
    assert {name: get_pattern_value(pattern, name, default) for name in ranks} == ranks
    assert len(pattern) == sum(rank != default for rank in ranks.values())


@given(st.dictionaries(NAMES, RANKS, min_size=1), RANKS, ALPHAS)
def test_alphas_give_every_module_the_scale_of_the_configuration(ranks: dict[str, int], r: int, alpha: float) -> None:
    alphas = compute_equal_scale_alphas(ranks, r, alpha)
    for name, rank in ranks.items():
        assert alphas[name] / rank == pytest.approx(alpha / r)


@given(RANKS, ALPHAS)
def test_each_scaling_is_a_configuration_of_peft(rank: int, alpha: float) -> None:
    expected = {"alpha/r": alpha / rank, "alpha/sqrt(r)": alpha / math.sqrt(rank), "constant": alpha / 16}
    for name, scale in expected.items():
        assert convert_scaling(name, alpha, rank) / rank == pytest.approx(scale)  # type: ignore[arg-type]


@given(st.lists(st.tuples(RANKS, st.integers(1, 5000)), min_size=1, max_size=5))
def test_the_equivalent_rank_is_the_smallest_with_as_many_parameters(modules: list[tuple[int, int]]) -> None:
    ranks, sizes = zip(*modules, strict=True)
    parameters, rank = sum(map(math.prod, modules)), compute_equivalent_rank(ranks, sizes)
    assert (rank - 1) * sum(sizes) < parameters <= rank * sum(sizes)
    assert compute_slot_bytes([(size, size) for size in sizes], rank) == 4 * rank * sum(sizes)


@given(RANKS, RANKS)
def test_a_server_reserves_the_next_slot(rank: int, other: int) -> None:
    served = find_server_rank(rank)
    assert served == min((slot for slot in SERVER_RANKS if slot >= rank), default=rank)
    assert format_slot(rank) == (
        f"the largest layer, rank {rank}, takes the same slot as rank {served} on vLLM" if served > rank else ""
    )
    low, high = sorted((rank, other))
    assert format_rank(low, low, high) == (f"{low} (modules from {low} to {high})" if low < high else str(low))


@given(RANKS, RANKS)
def test_advice_on_a_change_of_rank_has_the_measured_powers(rank: int, to: int) -> None:
    powers = [f"{(to / rank) ** power:.2f}" for power in (0.03, 0.23, -0.41)]
    figures = "×{} in our grids, ×{} in public ones); with alpha = r multiply it by {}".format(*powers)
    assert format_rank_change(rank, to).startswith(f"from rank {rank} to {to}: ")
    assert format_rank_change(rank, to).endswith(figures)


@given(st.integers(1, 4) | RANKS, st.lists(st.integers(0, 3) | st.integers(0, 700), max_size=2))
def test_candidates_are_the_requested_ranks_or_powers_of_two_with_the_rank_itself(
    top: int, requested: list[int]
) -> None:
    adapter: Any = SimpleNamespace(rank=top, path="adapter")
    if top == 1 or not all(1 <= rank <= top for rank in requested):
        with pytest.raises(SettingsError):
            list_candidate_ranks(adapter, requested)
    else:
        expected = {*requested, top} if requested else {top, *(2**power for power in range(10) if 2**power < top)}
        assert list_candidate_ranks(adapter, requested) == sorted(expected)
