"""The joint distribution of the ranks' means: its probabilities, and how rarely equal ranks are called worse."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student

from rightrank.decision.comparison import CONFIDENCE
from rightrank.decision.evidence import Evidence
from rightrank.decision.posterior import sample_joint_means
from rightrank.decision.rule import decision_of
from rightrank.decision.seeds import NOISE, multivariate_noise
from rightrank.decision.table import Cell, ScoreTable
from tests.decision.tables import scored

TABLES, SPREAD, MARGIN = 60, 0.12, 0.005
ROUNDING = 0.015  # three standard errors of a probability by sampling


def apart(ranks: int) -> np.ndarray:
    """Variances of the differences of independent means with variance 1."""
    return 2.0 - 2.0 * np.eye(ranks)


def equal_ranks(seed: int, ranks: tuple[int, ...], seeds: int, examples: int = 256) -> ScoreTable:
    """Ranks that are equally good, with the noise of the twelve long grids."""
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
    """By the difference from the best alone 63% of them are."""
    decisions = [decision_of(equal_ranks(seed, ranks, seeds), MARGIN) for seed in range(TABLES)]
    others = TABLES * (len(ranks) - 1)
    assert sum(len(decision.probably_worse) for decision in decisions) / others < 0.1
    undecided = [decision for decision in decisions if decision.verdict == "undecided"]
    assert len(undecided) > TABLES / 5
    told = [decision for decision in undecided if "probably worse" in decision.sentence]
    assert len(told) < 0.15 * len(undecided)  # tables, of several ranks each


def test_a_rank_that_is_worse_is_still_called_so() -> None:
    table = scored({1: 2.3, 4: 2.1, 16: 2.0, 64: 2.0005}, items=400, seeds=(0,), noise=0.03)
    assert decision_of(table, 0.001).probably_worse == [1, 4]


def test_of_two_ranks_it_is_the_t_distribution_of_their_difference() -> None:
    joint = sample_joint_means([4, 16], [2.0, 2.5], apart(2), 8.0)
    for margin in (-1.0, 0.0, 0.7, 2.0):
        worse = joint.worse_than_best()
        expected = student.cdf((max(margin, 0) - 0.5) / 2**0.5, 8) if margin >= 0 else 0.0
        assert np.mean(worse[1] <= margin) == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("count", [2, 4, 6])
def test_each_of_equal_ranks_is_as_likely_to_be_the_best(count: int) -> None:
    joint = sample_joint_means(list(range(1, count + 1)), [2.0] * count, apart(count), 8.0)
    assert np.mean(joint.worse_than_best() <= 0, axis=1) == pytest.approx(np.full(count, 1 / count), abs=ROUNDING)
    assert joint.alike(CONFIDENCE) == list(range(1, count + 1))


def test_the_base_is_no_rival() -> None:
    joint = sample_joint_means([0, 4, 16], [1.0, 2.0, 9.0], apart(3), 8.0)
    assert np.mean(joint.worse_than_best()[1] <= 0) > 0.99
    assert np.mean(joint.worse_than_best()[0]) < -0.9
    assert joint.alike(CONFIDENCE) == [4]


def test_a_noisy_rank_that_is_far_behind_hides_no_other() -> None:
    variances = apart(3)
    variances[2] = variances[:, 2] = 1e4
    variances[2, 2] = 0.0
    joint = sample_joint_means([4, 16, 64], [2.0, 7.0, 9e3], variances, 8.0)
    assert joint.alike(CONFIDENCE) == [4]
    assert sample_joint_means([4, 16, 64], [2.0, 3.0, 9e3], variances, 8.0).alike(CONFIDENCE) == [4, 16]


def test_the_noise_has_the_covariance_and_leaves_other_generators_alone() -> None:
    shape = np.array([[2.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
    before = repr(np.random.get_state())
    noise = multivariate_noise(shape, 1e9, 20_000)
    assert repr(np.random.get_state()) == before
    assert np.cov(noise) == pytest.approx(shape, abs=0.06)
    assert np.array_equal(noise, multivariate_noise(shape, 1e9, 20_000))
    assert np.array_equal(noise[:2], multivariate_noise(shape[:2, :2], 1e9, 20_000))
    impossible = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, -1.0], [1.0, -1.0, 1.0]])
    assert np.isfinite(multivariate_noise(impossible, 8.0, 100)).all()


def test_a_probability_is_of_all_other_ranks_at_once() -> None:
    joint = Evidence(scored({1: 2.3, 4: 2.012, 16: 2.002, 64: 2.0}, seeds=(0,), noise=0.06)).joint
    means, together = (dict(zip(joint.ranks, rows, strict=True)) for rows in (joint.means, joint.worse_than_best()))
    each = [student.cdf((0.02 - means[4] + means[other]) / joint.error(4, other), joint.degrees) for other in (16, 64)]
    assert 1 - sum(1 - one for one in each) - ROUNDING < np.mean(together[4] <= 0.02) < min(each) - ROUNDING


def test_what_is_said_to_be_likely_is_so() -> None:
    """Said .76, so the smallest probability over the other ranks came true in .72 here."""
    generator, events = np.random.default_rng(3), []
    for _ in range(400):
        true = 2.0 * generator.standard_normal(5)
        measured = true + generator.standard_normal(5) / np.sqrt(generator.chisquare(8) / 8)
        order = np.argsort(measured)
        worse = sample_joint_means([1, 4, 8, 16, 64], measured[order], apart(5), 8.0).worse_than_best()
        events += zip(np.mean(worse <= 1.0, axis=1), true[order] - true.min() <= 1.0, strict=True)
    said, held = np.mean([event for event in events if 0.65 < event[0] < 0.85], axis=0)
    assert said - 0.03 < held < said + 0.08
