"""Truncation and padding of factors agree with dense decompositions, and truncation by moments with dense covariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightrank.adapters.truncation import (
    Moments,
    allocate_ranks,
    compute_distance,
    compute_singular_values,
    decompose_update,
    load_moments,
    resize_factors,
    save_moments,
)
from rightrank.schema.trials import Floats
from tests.examples import limit_examples

sizes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 8), st.integers(0, 10_000))


def draw_factors(rows: int, columns: int, rank: int, seed: int) -> tuple[Floats, Floats]:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((rows, rank)), generator.standard_normal((rank, columns))


def draw_covariance(size: int, seed: int) -> Floats:
    """Draw the covariance of correlated features with different scales."""
    generator = np.random.default_rng(seed)
    mixed = generator.standard_normal((3 * size, size)) @ generator.standard_normal((size, size))
    return mixed.T @ mixed / len(mixed)


def compute_moments(b: Floats, a: Floats, scale: float, inputs: Floats, gradients: Floats) -> Moments:
    """Compute the moments that result from covariances C [k, k] and G [d, d]."""
    return Moments(a @ inputs @ a.T, scale**2 * b.T @ gradients @ b)


@limit_examples(60)
@given(sizes, st.integers(1, 12), st.floats(0.1, 10))
def test_identity_covariances_give_the_plain_svd(size: tuple[int, int, int, int], rank: int, scale: float) -> None:
    rows, columns, present, seed = size
    b, a = draw_factors(rows, columns, present, seed)
    moments = compute_moments(b, a, scale, np.eye(columns), np.eye(rows))
    plain_b, plain_a = resize_factors(b, a, rank, scale)
    ours_b, ours_a = resize_factors(b, a, rank, scale, moments, scale)
    size_of = np.linalg.norm(scale * b @ a)
    values = np.linalg.svd(b @ a, compute_uv=False)
    nearest_tie = np.min(-np.diff(values), initial=np.inf)
    if nearest_tie > 1e-3 * values[0]:  # equal singular values leave the choice of directions free
        assert np.linalg.norm(ours_b @ ours_a - plain_b @ plain_a) <= 1e-5 * size_of
    plain_error = np.linalg.norm(scale * b @ a - plain_b @ plain_a)
    assert np.linalg.norm(scale * b @ a - ours_b @ ours_a) == pytest.approx(plain_error, abs=1e-5 * size_of)


@limit_examples(60)
@given(sizes, st.integers(0, 8), st.floats(0.1, 10), st.sampled_from([0.0, 0.01, 0.5]))
def test_the_discarded_costs_are_the_k_fac_loss_of_the_error(
    size: tuple[int, int, int, int], rank: int, scale: float, damping: float
) -> None:
    """½·tr(G·E·C·Eᵀ) with the whole covariances, which gathering never forms; damping adds a share of the identity to each."""
    rows, columns, present, seed = size
    b, a = draw_factors(rows, columns, present, seed)
    inputs, gradients = draw_covariance(columns, seed + 1), draw_covariance(rows, seed + 2)
    update = decompose_update(b, a, scale, compute_moments(b, a, scale, inputs, gradients), damping)
    inputs += damping * np.trace(a @ inputs @ a.T) / np.trace(a @ a.T) * np.eye(columns)
    gradients += damping * np.trace(b.T @ gradients @ b) / np.trace(b.T @ b) * np.eye(rows)
    kept_b, kept_a = update.b[:, :rank], update.a[:rank]
    error = scale * (b @ a - kept_b @ kept_a)
    loss = 0.5 * np.trace(gradients @ error @ inputs @ error.T)
    assert loss == pytest.approx(update.costs[rank:].sum(), rel=1e-5, abs=1e-6 * update.costs[0])
    assert (np.diff(update.costs) <= 1e-9 * update.costs[0]).all()


@limit_examples(40)
@given(sizes, st.integers(1, 4))
def test_no_other_truncation_costs_less(size: tuple[int, int, int, int], rank: int) -> None:
    rows, columns, present, seed = size
    b, a = draw_factors(rows, columns, present, seed)
    inputs, gradients = draw_covariance(columns, seed + 1), draw_covariance(rows, seed + 2)

    def loss(new_b: Floats, new_a: Floats) -> float:
        error = b @ a - new_b @ new_a
        return float(0.5 * np.trace(gradients @ error @ inputs @ error.T))

    best = decompose_update(b, a, 1.0, compute_moments(b, a, 1.0, inputs, gradients), damping=0.0)
    u, sigma, vt = np.linalg.svd(b @ a)
    plain = loss(u[:, :rank] * sigma[:rank], vt[: len(sigma)][:rank]) if rank <= len(sigma) else 0.0
    scale = loss(np.zeros((rows, 0)), np.zeros((0, columns)))
    assert loss(best.b[:, :rank], best.a[:rank]) <= plain + 1e-6 * scale


@limit_examples(40)
@given(sizes, st.integers(1, 7), st.booleans())
def test_directions_of_a_truncation_are_orthogonal(
    size: tuple[int, int, int, int], rank: int, has_moments: bool
) -> None:
    """Others could nearly cancel each other, and rounding to a file's type would then cost a larger share of the product."""
    rows, columns, present, seed = size
    b, a = draw_factors(rows, columns, present, seed)
    inputs, gradients = draw_covariance(columns, seed + 1), draw_covariance(rows, seed + 2)
    moments = compute_moments(b, a, 1.0, inputs, gradients) if has_moments else None
    new_b, new_a = resize_factors(b, a, min(rank, present), 1.0, moments)
    used = np.linalg.norm(new_b, axis=0) > 0
    for gram in (new_b[:, used].T @ new_b[:, used], new_a[used] @ new_a[used].T):
        assert np.allclose(gram, np.diag(np.diag(gram)), atol=1e-6 * gram.max())


@limit_examples(20)
@given(st.dictionaries(st.sampled_from(["q", "layers.0.v", "layers.10.v.inputs"]), st.integers(1, 5)))
def test_moments_are_read_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, ranks: dict[str, int]) -> None:
    path = tmp_path_factory.mktemp("moments") / "moments.safetensors"
    assert load_moments(path) == {}
    moments = {name: Moments(draw_covariance(rank, 0), draw_covariance(rank, 1)) for name, rank in ranks.items()}
    save_moments(path, moments)
    loaded = load_moments(path)
    assert loaded.keys() == moments.keys()
    for name, moment in moments.items():
        assert np.allclose(loaded[name].inputs, moment.inputs, rtol=1e-6)
        assert np.allclose(loaded[name].gradients, moment.gradients, rtol=1e-6)


@given(sizes, st.booleans())
def test_an_update_of_zero_has_no_cost(size: tuple[int, int, int, int], has_zero_a: bool) -> None:
    b, a = draw_factors(*size)
    update = decompose_update(b * has_zero_a, a * (not has_zero_a), 1.0)
    assert not update.costs.any()
    assert not (update.b @ update.a).any()


def test_a_direction_that_the_data_do_not_see_goes_first() -> None:
    """Drop the largest singular direction if it acts on an input that is always zero."""
    b, a = np.diag([10.0, 1.0, 0.5]), np.eye(3)
    inputs = np.diag([0.0, 1.0, 1.0])
    new_b, new_a = resize_factors(b, a, 1, 1.0, compute_moments(b, a, 1.0, inputs, np.eye(3)))
    assert abs((new_b @ new_a)[1, 1]) == pytest.approx(1.0, rel=0.01)
    plain_b, plain_a = resize_factors(b, a, 1, 1.0)
    assert (plain_b @ plain_a)[0, 0] == pytest.approx(10.0)


def test_moments_without_a_gradient_fall_back_to_the_plain_metric() -> None:
    b, a = draw_factors(6, 5, 4, 0)
    nothing = Moments(np.zeros((4, 4)), np.zeros((4, 4)))
    for factor, plain_factor in zip(resize_factors(b, a, 2, 1.0, nothing), resize_factors(b, a, 2, 1.0), strict=True):
        assert np.allclose(np.abs(factor), np.abs(plain_factor), atol=1e-6)
    assert np.allclose(decompose_update(b, a, 2.0, nothing).costs, decompose_update(b, a, 2.0).costs, rtol=1e-9)


@limit_examples(60)
@given(
    st.lists(st.tuples(st.integers(2, 40), st.integers(1, 16)), min_size=1, max_size=6),
    st.integers(1, 16),
    st.integers(0, 3),
    st.integers(0, 10_000),
)
def test_ranks_within_keep_the_budget_and_the_cap(
    modules: list[tuple[int, int]], rank: int, above: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    costs = [cost for cost, _ in modules]
    spectra = [np.sort(generator.exponential(size=length))[::-1] for _, length in modules]
    max_rank = rank + above
    ranks = allocate_ranks(spectra, costs, rank * sum(costs), max_rank)
    assert all(1 <= module_rank <= min(max_rank, len(s)) for module_rank, s in zip(ranks, spectra, strict=True))
    assert sum(module_rank * cost for module_rank, cost in zip(ranks, costs, strict=True)) <= rank * sum(costs)
    if above == 0:
        assert ranks == [min(rank, len(s)) for s in spectra]
    cheaper, dearer = allocate_ranks([spectra[0]] * 2, [costs[0], 3 * costs[0]], 4 * rank * costs[0], max_rank)
    assert cheaper >= dearer


def test_a_budget_buys_the_most_energy_a_parameter() -> None:
    strong, weak = np.array([10.0, 9.0, 8.0, 7.0]) ** 2, np.array([1.0, 0.1]) ** 2
    assert allocate_ranks([strong, weak], [10, 10], 50, 4) == [4, 1]
    assert allocate_ranks([strong, weak], [10, 10], 20, 4) == [1, 1]
    assert allocate_ranks([strong, strong], [10, 1000], 1040, 4) == [4, 1]


@limit_examples(80)
@given(sizes, st.integers(1, 12), st.floats(0.1, 10), st.integers(0, 6), st.booleans(), st.booleans())
def test_truncation_error_is_the_discarded_energy(
    size: tuple[int, int, int, int], rank: int, ratio: float, decay: int, is_padded: bool, has_zero_row: bool
) -> None:
    """Eckart and Young: no approximation of that rank is nearer, and its distance is the tail of the spectrum.

    Neither columns of B that are nearly dependent, nor columns of B or rows of A that are zero, nor columns that differ in size from the rows of A, cost more than the
    digits that a product of factors loses.
    """
    rows, columns, present, seed = size
    b, a = draw_factors(rows, columns, present, seed)
    mixing = np.linalg.qr(draw_factors(present, present, present, seed)[1])[0]
    b = b * np.logspace(0, -decay, present) @ mixing
    b[:, -1] *= not is_padded
    a[0] *= not has_zero_row
    balance = 10.0 ** np.random.default_rng(seed).integers(-6, 7, present)
    b, a = b * balance, a / balance[:, None]
    dense = np.linalg.svd(b @ a, compute_uv=False)
    tolerance = 1e-6 * np.linalg.norm(b / balance, 2) * np.linalg.norm(a.T * balance, 2)

    values = compute_singular_values(b, a)
    assert len(values) == present
    count = min(present, len(dense))
    assert np.allclose(values[:count], dense[:count], rtol=0, atol=tolerance)
    assert np.allclose(values[count:], 0, atol=tolerance)

    costs = decompose_update(b, a, ratio).costs
    assert np.allclose(np.sqrt(2 * costs), ratio * values, rtol=0, atol=ratio * tolerance)

    new_b, new_a = resize_factors(b, a, rank, ratio)
    assert new_b.shape == (rows, rank)
    assert new_a.shape == (rank, columns)
    tail = np.sqrt(np.sum(dense[rank:] ** 2)) * ratio
    assert np.linalg.norm(new_b @ new_a - ratio * (b @ a)) == pytest.approx(tail, abs=ratio * tolerance)
    assert compute_distance(b * ratio, a, new_b, new_a) == pytest.approx(tail, abs=ratio * tolerance)


@pytest.mark.parametrize("rank", [2, 4, 7])
def test_a_direction_without_energy_can_still_be_trained(rank: int) -> None:
    """B of rank 1 among four columns: the product is kept, and no row of A is zero beside a zero column of B."""
    first_b, a = draw_factors(9, 11, 4, 0)
    b = first_b * [1, 0, 0, 0]
    for start in (b, np.zeros((9, 4))):
        new_b, new_a = resize_factors(start, a, rank, 0.5)
        assert np.allclose(new_b @ new_a, 0.5 * start @ a)
        assert (np.linalg.norm(new_a, axis=1) > 0.1).all()
        assert (np.abs(new_a[4:]) <= 1 / math.sqrt(11)).all()  # as PEFT draws the rows of a new adapter
