"""The mathematics of spectra, against dense decompositions and known laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rightrank.adapters import spectra


def factors(rows: int, columns: int, rank: int, seed: int) -> tuple[spectra.Floats, spectra.Floats]:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((rows, rank)), generator.standard_normal((rank, columns))


sizes = st.tuples(st.integers(1, 90), st.integers(1, 90), st.integers(1, 16), st.integers(0, 10_000))


@settings(max_examples=80, deadline=None)
@given(sizes, st.sampled_from([0, 1, 2, 3, 5, 7]), st.booleans())
def test_factored_values_are_those_of_the_product(size: tuple[int, int, int, int], decay: int, is_padded: bool) -> None:
    """Columns of B that are nearly dependent, or zero, lose no digit of the small singular values."""
    rows, columns, rank, seed = size
    b, a = factors(rows, columns, rank, seed)
    mixing = np.linalg.qr(factors(rank, rank, rank, seed)[1])[0]
    b = b * np.logspace(0, -decay, rank) @ mixing
    b[:, -1] *= not is_padded
    dense = np.linalg.svd(b @ a, compute_uv=False)
    ours = spectra.compute_singular_values(b, a)
    assert len(ours) == rank
    count = min(rank, len(dense))
    assert np.allclose(
        ours[:count], dense[:count], rtol=1e-9 if decay < 3 and not is_padded else 0, atol=1e-11 * dense[0]
    )


def test_energy_stable_and_effective_rank_of_known_spectra() -> None:
    flat = np.full(10, 3.0)
    assert spectra.compute_stable_rank(flat) == pytest.approx(10)
    assert spectra.compute_effective_rank(flat) == pytest.approx(10)
    assert spectra.compute_energy_rank(flat, 0.9) == 9
    assert spectra.compute_energy_rank(flat, 1.0) == 10
    single = np.array([2.0, 0.0, 0.0])
    assert (
        spectra.compute_stable_rank(single),
        spectra.compute_effective_rank(single),
        spectra.compute_energy_rank(single, 0.99),
    ) == (1, 1, 1)
    nothing = np.zeros(4)
    assert (spectra.compute_stable_rank(nothing), spectra.compute_effective_rank(nothing)) == (0, 0)
    assert spectra.compute_energy_rank(nothing, 0.9) == 0
    assert spectra.compute_energy_rank(np.array([3.0]), 0.99, total=18.0) is None  # half of the energy is not in view


def test_the_hard_threshold_is_gavish_and_donohos() -> None:
    """Their paper's constants for square matrices: 2.858 times the median; λ* = 4/√3 times σ·√rows where σ is known."""
    beside_the_median = [np.concatenate([[factor], np.ones(98)]) for factor in (2.853, 2.863)]
    assert [spectra.compute_hard_threshold_rank(s, 99, 99) for s in beside_the_median] == [0, 1]
    bound = 4 / np.sqrt(3) * np.sqrt(1000)  # of the kept value, where the energy of the rest gives σ = 1
    for value, count in ((0.99 * bound, 0), (1.01 * bound, 1)):
        values = np.array([value])
        energy = 999 * 999 + value**2 if count else 1000 * 1000
        assert spectra.compute_leading_noise_rank(values, energy, 1000, 1000) == count


@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("shape", [(60, 60), (40, 120), (150, 30)])
def test_a_planted_rank_is_found_in_noise(rank: int, shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(rank)
    u = np.linalg.qr(generator.standard_normal((shape[0], 8)))[0][:, :rank]
    v = np.linalg.qr(generator.standard_normal((shape[1], 8)))[0][:, :rank]
    noisy = 5 * np.sqrt(max(shape)) * u @ v.T + generator.standard_normal(shape)
    s = np.linalg.svd(noisy, compute_uv=False)
    assert spectra.compute_hard_threshold_rank(s, *shape) == rank
    assert spectra.compute_leading_noise_rank(s[:12], float(np.sum(s**2)), *shape) == rank
