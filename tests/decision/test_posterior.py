"""Test the joint distribution of the means of all ranks, and how rarely it calls equal ranks worse."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student

from rightrank.decision.evidence import NOISE, Evidence, sample_joint_noise, sample_multivariate_noise
from rightrank.decision.rule import decide_table
from rightrank.decision.table import Cell, ScoreTable
from tests.decision.tables import build_example_table

TABLES, SPREAD, MARGIN = 60, 0.12, 0.005
ROUNDING = 0.015  # three standard errors of a probability by sampling


def compute_difference_variances(ranks: int) -> np.ndarray:
    """Return the variances of the differences between independent means of variance 1."""
    return 2.0 - 2.0 * np.eye(ranks)


def draw_equal_ranks(seed: int, ranks: tuple[int, ...], seeds: int, examples: int = 256) -> ScoreTable:
    """Draw a table of equally good ranks with the noise of the twelve long grids."""
    generator, each = np.random.default_rng(seed), SPREAD / 2**0.5
    sums = 2 + 0.6 * generator.standard_normal(examples)
    sums = sums + each * NOISE.examples**0.5 * generator.standard_normal((len(ranks), 1, examples))
    sums = sums + each * NOISE.seeds**0.5 * generator.standard_normal((len(ranks), seeds, 1))
    sums = sums + each * NOISE.crossed**0.5 * generator.standard_normal((len(ranks), seeds, examples))
    cells = {
        (rank, 1e-3, run): Cell(f"{rank}-{run}", float(sums[row, run].mean()), sums[row, run], np.ones(examples))
        for row, rank in enumerate(ranks)
        for run in range(seeds)
    }
    return ScoreTable("eval_loss", False, cells)


@pytest.mark.parametrize(("ranks", "seeds"), [((1, 4, 16, 64), 1), ((1, 4, 16, 64), 2), ((4, 8, 16, 32, 64), 3)])
def test_equal_ranks_are_seldom_called_worse(ranks: tuple[int, ...], seeds: int) -> None:
    """Compare all ranks jointly: by the difference from the best alone, 63% of them are called worse."""
    decisions = [decide_table(draw_equal_ranks(seed, ranks, seeds), MARGIN) for seed in range(TABLES)]
    num_other_ranks = TABLES * (len(ranks) - 1)
    assert (
        sum(len(decision.ranks) - len(decision.indistinguishable_ranks) for decision in decisions) / num_other_ranks
        < 0.1
    )
    undecided = [decision for decision in decisions if decision.verdict == "undecided"]
    assert len(undecided) > TABLES / 5
    warned = [decision for decision in undecided if "probably worse" in decision.sentence]
    assert len(warned) < 0.15 * len(undecided)  # tables of several ranks


def test_a_worse_rank_is_called_worse() -> None:
    table = build_example_table({1: 2.3, 4: 2.1, 16: 2.0, 64: 2.0005}, num_examples=400, seeds=(0,), noise=0.03)
    assert not {1, 4} & set(decide_table(table, 0.001).indistinguishable_ranks)


def test_the_joint_noise_has_the_t_distribution_of_each_difference() -> None:
    noise = sample_joint_noise(compute_difference_variances(4), 8.0)
    for row in range(1, 4):
        for distance in (0.7, 2.0):
            expected = student.cdf(distance / 2**0.5, 8)
            assert np.mean(noise[row] - noise[row - 1] <= distance) == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("count", [2, 4, 6])
def test_each_of_equal_ranks_is_as_likely_to_be_the_best(count: int) -> None:
    noise = sample_joint_noise(compute_difference_variances(count), 8.0)
    assert np.mean(noise <= noise.min(axis=0), axis=1) == pytest.approx(np.full(count, 1 / count), abs=ROUNDING)


def test_the_base_is_not_compared_with_the_ranks() -> None:
    table = build_example_table({0: 1.9, 4: 2.0, 16: 2.3}, seeds=(0,), noise=0.03)
    evidence = Evidence(table)
    assert evidence.compute_probability(4, 0.0) == pytest.approx(1.0, abs=0.01)
    assert evidence.compute_probability(0, -0.01) == pytest.approx(1.0, abs=0.01)


def test_the_noise_has_the_covariance_and_leaves_other_generators_alone() -> None:
    shape = np.array([[2.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
    state_before = repr(np.random.get_state())
    noise = sample_multivariate_noise(shape, 1e9, 20_000)
    assert repr(np.random.get_state()) == state_before
    assert np.cov(noise) == pytest.approx(shape, abs=0.06)
    assert np.array_equal(noise, sample_multivariate_noise(shape, 1e9, 20_000))
    assert np.array_equal(noise[:2], sample_multivariate_noise(shape[:2, :2], 1e9, 20_000))
    impossible = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, -1.0], [1.0, -1.0, 1.0]])
    assert np.isfinite(sample_multivariate_noise(impossible, 8.0, 100)).all()


def test_probabilities_are_calibrated() -> None:
    """Check the calibration: a predicted .76, the smallest probability over the other ranks, came true in .72 here."""
    generator, events = np.random.default_rng(3), []
    for _ in range(400):
        true = 2.0 * generator.standard_normal(5)
        measured = true + generator.standard_normal(5) / np.sqrt(generator.chisquare(8) / 8)
        order = np.argsort(measured)
        true_losses = measured[order][:, None] + sample_joint_noise(compute_difference_variances(5), 8.0)
        worse = true_losses - true_losses.min(axis=0)
        events += zip(np.mean(worse <= 1.0, axis=1), true[order] - true.min() <= 1.0, strict=True)
    predicted, observed = np.mean([event for event in events if 0.65 < event[0] < 0.85], axis=0)
    assert predicted - 0.03 < observed < predicted + 0.08
