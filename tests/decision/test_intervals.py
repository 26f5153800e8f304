from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rightrank.decision.intervals import estimate, seed_parts, winners_gap


def test_one_seed_is_the_textbook_t_interval_but_for_skewness() -> None:
    scores = np.random.default_rng(0).standard_normal(40)
    scores = np.concatenate([scores, -scores])  # symmetric: no shift
    found = estimate(scores[None, :], np.ones(80))
    expected = stats.t.interval(0.95, 79, loc=scores.mean(), scale=stats.sem(scores))
    assert (found.bound(0.025), found.bound(0.975)) == pytest.approx(expected)


def test_token_weights_give_the_token_mean_and_equal_weights_the_example_mean() -> None:
    tokens = np.array([1.0, 3.0, 6.0])
    means = np.array([2.0, 4.0, 1.0])
    assert estimate((means * tokens)[None, :], tokens).mean == pytest.approx((2 + 12 + 6) / 10)
    assert estimate(means[None, :], np.ones(3)).mean == pytest.approx(7 / 3)


def test_zeros_and_ones_have_the_binomial_error() -> None:
    hits = np.array([1.0] * 30 + [0.0] * 70)
    assert estimate(hits[None, :], np.ones(100)).standard_error == pytest.approx(np.sqrt(0.3 * 0.7 / 99))


def test_seed_noise_is_split_into_what_ranks_share_and_what_they_do_not() -> None:
    generator = np.random.default_rng(1)
    means = 0.5 * generator.standard_normal(4000)[None, :] + 0.1 * generator.standard_normal((6, 4000))
    common, individual = seed_parts(means)
    assert individual == pytest.approx(0.01, rel=0.05)
    assert common == pytest.approx(0.25 + 0.01 / 6, rel=0.1)


@pytest.mark.parametrize(
    ("seeds", "items", "heavy"), [(1, 200, False), (1, 200, True), (3, 100, False), (5, 300, True)]
)
def test_intervals_cover(seeds: int, items: int, heavy: bool) -> None:
    """Two crossed factors, true mean 0: the 95% interval covers at its rate."""
    generator = np.random.default_rng(7)
    covered = 0
    tables = 600
    for _ in range(tables):
        item = generator.lognormal(0, 0.6, items) - np.exp(0.18) if heavy else generator.standard_normal(items)
        seed = 0.05 * generator.standard_normal(seeds) if seeds > 1 else np.zeros(1)
        both = 0.5 * generator.standard_normal((seeds, items))
        found = estimate(item[None, :] + seed[:, None] + both, np.ones(items))
        covered += found.bound(0.025) <= 0 <= found.bound(0.975)
    assert 0.925 <= covered / tables <= 0.985


def test_more_of_either_narrows_the_interval() -> None:
    found = estimate(np.random.default_rng(0).standard_normal((3, 50)), np.ones(50))
    assert found.at(200, 3).standard_error < found.standard_error
    assert found.at(50, 12).standard_error < found.standard_error
    assert found.at(50, 3).variance == pytest.approx(found.variance)


def test_the_winner_of_equals_is_optimistic_by_the_expected_minimum() -> None:
    assert winners_gap(np.zeros(2), np.eye(2)) == pytest.approx(np.pi**-0.5, rel=0.05)
    assert winners_gap(np.zeros(3), np.eye(3)) == pytest.approx(0.846, rel=0.05)
    assert winners_gap(np.array([0.0, 100.0]), np.eye(2)) == pytest.approx(0.0, abs=0.06)
    assert winners_gap(np.zeros(1), np.eye(1)) == 0.0
