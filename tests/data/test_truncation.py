"""Truncation and padding of factors, against dense decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rightrank.adapters import spectra
from rightrank.models.truncation import resized_factors

sizes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 8), st.integers(0, 10_000))


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 12), st.floats(0.1, 10))
def test_truncation_error_is_the_discarded_energy(size: tuple[int, int, int, int], rank: int, ratio: float) -> None:
    """Eckart and Young: no approximation of that rank is nearer, and its distance is the tail of the spectrum."""
    rows, columns, present, seed = size
    generator = np.random.default_rng(seed)
    b, a = generator.standard_normal((rows, present)), generator.standard_normal((present, columns))
    new_b, new_a = (x.numpy() for x in resized_factors(torch.from_numpy(b), torch.from_numpy(a), rank, ratio))
    assert new_b.shape == (rows, rank)
    assert new_a.shape == (rank, columns)
    dense = np.linalg.svd(b @ a, compute_uv=False)
    tail = np.sqrt(np.sum(dense[rank:] ** 2)) * ratio
    assert np.linalg.norm(new_b @ new_a - ratio * (b @ a)) == pytest.approx(tail, abs=1e-9 * ratio * dense[0])
    distance = spectra.factored_distance(b * ratio, a, new_b, new_a)
    assert distance == pytest.approx(tail, abs=1e-9 * ratio * dense[0])


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_factors_in_float32_are_truncated_in_float32(rank: int) -> None:
    torch.manual_seed(0)
    a, b, ratio = torch.randn(6, 11), torch.randn(9, 6), 1.7
    new_b, new_a = resized_factors(b, a, rank, ratio)
    product = ratio * b @ a
    dropped = torch.linalg.svdvals(product)[rank:]
    assert (new_b.dtype, new_a.dtype) == (torch.float32, torch.float32)
    assert (new_b.shape, new_a.shape) == ((9, rank), (rank, 11))
    assert torch.dist(new_b @ new_a, product) == pytest.approx(float(dropped.norm()), abs=1e-4)


@pytest.mark.parametrize("rank", [2, 4, 7])
def test_a_direction_without_energy_can_still_be_trained(rank: int) -> None:
    """B of rank 1 among four columns: the product is kept, and no row of A is zero beside a zero column of B."""
    torch.manual_seed(0)
    b = torch.zeros(9, 4)
    b[:, 0] = torch.randn(9)
    a = torch.randn(4, 11)
    for start in (b, torch.zeros(9, 4)):
        new_b, new_a = resized_factors(start.double(), a.double(), rank, 0.5)
        assert torch.allclose(new_b @ new_a, 0.5 * (start @ a).double())
        assert (new_a.norm(dim=1) > 0.1).all()
