"""Test the seed noise of paired differences, and comparisons on shared seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rightrank.decision.evidence import NOISE, Evidence, PairNoise, Prior, measure_pair_noise, pool_prior
from rightrank.decision.rule import compare_ranks
from rightrank.decision.table import Cell, ScoreTable, compute_adjusted_means, select_best_learning_rate


def test_the_noise_of_a_difference_by_hand() -> None:
    """Compute by hand: the seed means differ by 2, so their variance is 2; the examples of the seeds vary by 1 and 3."""
    noise = measure_pair_noise(np.array([[0.0, 2.0], [1.0, 5.0]]), np.ones(2))
    assert (noise.variance, noise.degrees) == (2.0, 1.0)
    assert noise.example_variance == pytest.approx((2.0 + 8.0) / 2)
    assert measure_pair_noise(np.array([[1.0], [3.0], [5.0]]), np.ones(1)) == PairNoise(4.0, 2.0, 1.0)


def test_a_variance_is_moderated_by_degrees_of_freedom() -> None:
    pair = PairNoise(variance=8.0, degrees=1.0, example_variance=100.0)
    assert Prior(0.02, 3.0).moderate(pair) == ((3 * 2.0 + 8.0) / 4, 4.0)


START = Prior(NOISE.compute_seed_ratio(300), 0.5)


def test_one_seed_does_not_measure_noise() -> None:
    noises = [PairNoise(0.0, 0.0, 1.0)] * 3
    assert pool_prior(noises, START, math.inf) == START
    assert pool_prior([], Prior(0.0, 0.0), 8.0).moderate(noises[0]) == (0.0, 0.0)


def test_the_ratio_starts_at_that_of_earlier_grids_and_follows_the_ranks_at_hand() -> None:
    quiet = [PairNoise(0.0, 1.0, 1.0)] * 4
    prior = pool_prior(quiet, START, 8.0)
    assert prior.ratio == pytest.approx(START.ratio * START.degrees / (START.degrees + 2))
    assert prior.degrees == pytest.approx(1 / (1 / 8 + 1 / (START.degrees + 2)))
    assert pool_prior(quiet * 100, START, 8.0).ratio < START.ratio / 20
    assert pool_prior([PairNoise(4.0, 1.0, 1.0), PairNoise(8.0, 1.0, 1.0)], Prior(0.0, 0.0), 3.0).ratio == 6.0


def test_rows_are_compared_on_the_seeds_that_they_share() -> None:
    """Adjust for the shared seeds: seed 1 is worse by 2 for every row, and a row without it is not better for that."""
    first, second, third = compute_adjusted_means([{0: 1.0, 1: 3.0}, {0: 1.1}, {0: 0.9, 1: 2.9}])
    assert second - first == pytest.approx(0.1, abs=1e-6)
    assert third - first == pytest.approx(-0.1, abs=1e-6)


THREE = {0: 6.0598, 1: 6.0617, 2: 6.0624}


@pytest.mark.parametrize(
    ("other_seeds", "best"),
    [
        ({0: 6.0608}, 1e-3),  # below the mean of three, but worse on the common seed
        ({1: 6.0608}, 3e-3),
        ({0: 6.0599, 1: 6.0617, 2: 6.0625}, 1e-3),
        ({0: 6.0597, 1: 6.0617, 2: 6.0623}, 3e-3),
        ({7: 5.0}, 1e-3),  # no common seed
        (dict(THREE), 1e-3),  # the lower rate on ties
    ],
)
def test_learning_rates_are_compared_on_shared_seeds(other_seeds: dict[int, float], best: float) -> None:
    losses = {1e-3: THREE, 3e-3: other_seeds}

    def is_lower(rate: float, other_rate: float) -> bool:
        shared = losses[rate].keys() & losses[other_rate].keys()
        return sum(losses[rate][seed] - losses[other_rate][seed] for seed in shared) < 0

    assert select_best_learning_rate(losses, is_lower) == best
    assert select_best_learning_rate(losses, lambda *_: False) == (1e-3 if len(other_seeds) < 3 else best)


@pytest.mark.parametrize("deviation", [0.005, 0.01, 0.02])
def test_two_noisy_seeds_seldom_name_a_rank_that_is_worse_by_the_margin(deviation: float) -> None:
    """Allow at most 5% errors, since the true difference is the margin; 500 tables measure that within about two points."""
    generator, rows, margin, num_named = np.random.default_rng(1), 300, 0.02, 0
    for _ in range(500):
        ease = generator.normal(2, 0.5, rows)
        cells = {}
        for rank, worse in ((4, margin), (16, 0.0)):
            rank_values = ease + generator.normal(worse, 0.02, rows)
            for seed in range(2):
                sums = rank_values + generator.normal(0, 0.02, rows) + generator.normal(0, deviation)
                cells[rank, 1e-3, seed] = Cell(f"{rank} {seed}", float(sums.mean()), sums, np.ones(rows))
        comparison = compare_ranks(Evidence(ScoreTable("loss", False, cells, kind="loss")), margin)
        worst = comparison.by_rank[4].high if comparison.reference.rank == 16 else -comparison.by_rank[16].low
        num_named += worst <= margin
    assert num_named / 500 <= 0.07
