"""Test the allocator's rules, and its invariants for any sequence of requests."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rightrank.planning.peak import CachingAllocator

MIB = 2**20


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60 * MIB)), max_size=80))
def test_every_byte_is_accounted_for(requests: list[tuple[int, int]]) -> None:
    """Free repeated names. At any time reserved ≥ allocated ≥ requested, and everything is returned at the end."""
    allocator = CachingAllocator()
    requested: dict[int, int] = {}
    for name, size in requests:
        if name in requested:
            allocator.free(name)
            del requested[name]
        else:
            allocator.allocate(name, size)
            requested[name] = size
        assert allocator.reserved >= allocator.allocated >= sum(requested.values())
        assert allocator.allocated <= sum(size + 512 + MIB for size in requested.values())
    for name in requested:
        allocator.free(name)
    assert allocator.allocated == 0


@given(
    st.lists(st.integers(1, 30 * MIB), max_size=6),
    st.lists(st.tuples(st.integers(1, 30 * MIB), st.integers(0, 3)), min_size=1, max_size=20),
)
def test_a_step_that_reserves_nothing_new_repeats_itself(
    resident_sizes: list[int], requests: list[tuple[int, int]]
) -> None:
    """Check that the plan may stop there: allocated and reserved bytes after each request are equal in every later step."""
    allocator = CachingAllocator()

    def step() -> list[tuple[int, int]]:
        counts = []
        for name, (size, freed) in enumerate(requests):
            allocator.allocate(name, size)
            allocator.free(name - freed)
            counts.append((allocator.allocated, allocator.reserved))
        for name in range(len(requests)):
            allocator.free(name)
        return counts

    step()
    for name, size in enumerate(resident_sizes, len(requests)):
        allocator.allocate(name, size)
    for _ in range(4):
        reserved, counts = allocator.reserved, step()
        if allocator.reserved == reserved:
            assert step() == counts
