"""Test the comparison of two adapters: within the margin, worse than the margin, or undecided."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rightrank.decision.comparison import (
    Bounds,
    compute_binary_bound,
    compute_bounds,
    compute_file_bounds,
    compute_score_range,
    compute_t_quantile,
    compute_t_tail,
    estimate_file_difference,
    estimate_mean,
)
from rightrank.decision.table import Cell, compute_paired_difference
from rightrank.schema.metrics import MetricKind


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-1.0, 0.4, True), (-1.0, 0.5, True), (-1.0, 0.6, None), (0.5, 0.6, None), (0.51, 0.6, False)],
)
def test_a_bound_at_the_margin_is_within_it(low: float, high: float, expected: bool | None) -> None:
    assert Bounds(0.0, low, high).is_enough(0.5) is expected


@pytest.mark.parametrize("examples", [13, 30, 200])
def test_the_bound_is_about_three_over_n_if_no_example_differs(examples: int) -> None:
    weights = np.ones(examples)
    for bounds in (
        compute_file_bounds(0 * weights, weights, 1.0),
        compute_bounds(estimate_mean(0 * weights[None, :], weights, 1.0)),
    ):
        assert bounds.high == pytest.approx(3 / examples, rel=0.12)
        assert bounds.low == pytest.approx(-bounds.high, rel=1e-9)
        assert bounds.is_enough(0.01) is (True if examples > 300 else None)
    assert compute_file_bounds(0 * weights, weights).high == 0.0  # identical losses mean identical functions


@pytest.mark.parametrize("span", [1.0, 100.0])
def test_correct_answers_have_the_bounds_of_two_proportions(span: float) -> None:
    sums, weights = span * np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 33), np.ones(44)
    bounds = compute_file_bounds(sums, weights, span)
    assert bounds.mean == pytest.approx(span * 7 / 44)
    assert bounds.high == pytest.approx(span * compute_binary_bound(9, 2, 44, 0.95))
    assert bounds.low == pytest.approx(-span * compute_binary_bound(2, 9, 44, 0.95))


@pytest.mark.parametrize("other_scores", ["a share", "weights", "losses", "another span"])
def test_other_scores_have_the_bounds_of_a_mean(other_scores: str) -> None:
    sums, weights, span = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 33), np.ones(44), 1.0
    if other_scores == "a share":
        sums[0] = 0.5
    elif other_scores == "weights":
        sums, weights = 2 * sums, 2 * weights
        span = 2.0
    else:
        span = 0.0 if other_scores == "losses" else 2.0
    expected = compute_bounds(estimate_file_difference(sums, weights, span))
    assert compute_file_bounds(sums, weights, span) == expected
    assert expected.high != pytest.approx(compute_binary_bound(9, 2, 44, 0.95))


@pytest.mark.parametrize("degrees", [1.0, 1.3, 2.0, 4.7, 19.0, 200.5, 1e6])
def test_student_t_agrees_with_scipy(degrees: float) -> None:
    for probability in (0.001, 0.05, 0.3, 0.5, 0.7, 0.95, 0.975, 0.999999):
        expected = stats.t.ppf(probability, degrees)
        assert compute_t_quantile(degrees, probability) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    for x in (0.0, 0.4, 3.0, 40.0):
        assert compute_t_tail(degrees, x)[0] == pytest.approx(stats.t.sf(x, degrees), abs=1e-10)


@pytest.mark.parametrize(("worse", "better"), [(9, 1), (1, 9), (3, 0), (0, 4)])
def test_the_binary_bound_inverts_the_score_test(worse: int, better: int) -> None:
    """Check that the observed difference is z standard errors from the bound.

    The standard errors are those of the most likely shares that have this difference.
    """
    examples = 44
    bound = compute_binary_bound(worse, better, examples, 0.95)
    shares = np.linspace(
        max(0.0, -bound) + 1e-9, (1 - bound) / 2 - 1e-9, 200_001
    )  # fractions of examples that get worse
    likelihood = (
        worse * np.log(shares + bound)
        + better * np.log(shares)
        + (examples - worse - better) * np.log(1 - 2 * shares - bound)
    )
    share = float(shares[np.argmax(likelihood)])
    error = np.sqrt((2 * share + bound - bound**2) / examples)
    assert (bound - (worse - better) / examples) / error == pytest.approx(stats.norm.ppf(0.95), rel=1e-3)


def test_bounds_of_files_follow_the_kurtosis_and_widen_with_skewness_alone() -> None:
    scores = np.random.default_rng(0).exponential(1, 80) - 1
    estimated = estimate_file_difference(scores, np.ones(80))
    assert estimated.degrees == pytest.approx(2 * 80 / (stats.kurtosis(scores, fisher=False) - 1))
    reach = stats.t.ppf(0.95, estimated.degrees) * estimated.standard_error
    assert compute_bounds(estimated).low == pytest.approx(
        estimated.mean - reach
    )  # positive skewness does not change the lower bound
    assert compute_bounds(estimated).high > estimated.mean + reach
    assert estimated.degrees < 79
    mild = estimate_file_difference(np.random.default_rng(0).gamma(20, 1, 80), np.ones(80))
    assert compute_bounds(mild).high > mild.mean + 1.001 * stats.t.ppf(0.95, mild.degrees) * mild.standard_error
    small = estimate_file_difference(scores / 100, np.ones(80))  # the same in another unit
    assert small.degrees == pytest.approx(estimated.degrees)


def test_one_seed_is_the_textbook_t_interval_but_for_skewness() -> None:
    scores = np.random.default_rng(0).standard_normal(40)
    scores = np.concatenate([scores, -scores])  # symmetric: no shift
    estimated = estimate_mean(scores[None, :], np.ones(80))
    expected = stats.t.interval(0.95, 79, loc=scores.mean(), scale=stats.sem(scores))
    assert (estimated.compute_bound(0.025), estimated.compute_bound(0.975)) == pytest.approx(expected)


def test_token_weights_give_the_token_mean_and_equal_weights_the_example_mean() -> None:
    tokens = np.array([1.0, 3.0, 6.0])
    means = np.array([2.0, 4.0, 1.0])
    assert estimate_mean((means * tokens)[None, :], tokens).mean == pytest.approx((2 + 12 + 6) / 10)
    assert estimate_mean(means[None, :], np.ones(3)).mean == pytest.approx(7 / 3)


@pytest.mark.parametrize(
    ("seeds", "num_examples", "heavy"), [(1, 200, False), (1, 200, True), (3, 100, False), (5, 300, True)]
)
def test_intervals_cover(seeds: int, num_examples: int, heavy: bool) -> None:
    """Cover the true mean of 0 at the nominal rate of 95% with two crossed factors."""
    generator = np.random.default_rng(7)
    covered = 0
    tables = 600
    for _ in range(tables):
        example_effects = (
            generator.lognormal(0, 0.6, num_examples) - np.exp(0.18)
            if heavy
            else generator.standard_normal(num_examples)
        )
        seed = 0.05 * generator.standard_normal(seeds) if seeds > 1 else np.zeros(1)
        residuals = 0.5 * generator.standard_normal((seeds, num_examples))
        estimated = estimate_mean(example_effects[None, :] + seed[:, None] + residuals, np.ones(num_examples))
        covered += estimated.compute_bound(0.025) <= 0 <= estimated.compute_bound(0.975)
    assert 0.925 <= covered / tables <= 0.985


def test_the_difference_of_two_cells_is_paired_by_example() -> None:
    weights = np.array([1.0, 3.0])
    cell = Cell("one", 0.7, np.array([3.0, 1.0]), weights, 1.0)
    difference = compute_paired_difference(cell, Cell("other", 0.5, np.array([1.0, 2.0]), weights, 2.0))
    assert (difference.trial_id, difference.value, difference.score_range) == ("one", pytest.approx(0.2), 2.0)
    assert (difference.sums.tolist(), difference.weights.tolist()) == ([2.0, -1.0], [1.0, 3.0])


@pytest.mark.parametrize(
    ("kind", "sums", "weights", "span"),
    [
        ("token_loss", [7.0, 900.0], 1.0, 0.0),
        ("loss", [7.0, 900.0], 1.0, 0.0),
        ("perplexity", [7.0, 900.0], 1.0, 0.0),
        ("other", [2.0, -7.0], 1.0, 7.0),
        ("other", [6.0, 3.0], [3.0, 1.0], 3.0),
        ("other", [0.0, 0.0], 1.0, 1.0),
        ("accuracy", [0.0, 1.0], 1.0, 1.0),
        ("accuracy", [0.0, 0.0], 1.0, 1.0),
        ("accuracy", [0.0, -100.0], 1.0, 100.0),
        ("accuracy", [40.0, 55.0], 1.0, 100.0),
        ("accuracy", [0.0] * 199 + [100.0], 1.0, 100.0),  # a mean of half a percent
        ("accuracy", [1.5, 0.1], 1.0, 1.0),  # single values exceed 1
    ],
)
def test_the_range_of_a_score(kind: MetricKind, sums: list[float], weights: object, span: float) -> None:
    assert compute_score_range(kind, sums, np.asarray(weights)) == span


def test_the_degrees_of_an_estimate_are_those_of_its_seeds() -> None:
    two_seeds = estimate_mean(np.array([[1.0], [3.0]]), np.ones(1))
    assert (
        two_seeds.mean,
        two_seeds.seeds_variance,
        two_seeds.examples,
        two_seeds.seeds,
        two_seeds.seeds_degrees,
        two_seeds.skewness,
    ) == (
        2,
        1,
        0,
        2,
        1,
        0,
    )
    scores = np.random.default_rng(3).normal(0.0, 1.0, (3, 50))
    assert estimate_mean(scores, np.ones(50)).seeds_degrees == 2.0
    one_seed = estimate_mean(scores[:1], np.ones(50))
    assert (one_seed.seeds_degrees, one_seed.seeds_variance, one_seed.interaction_variance) == (0.0, 0.0, 0.0)


SMALL = np.linspace(1e-7, 2e-6, 60).tolist()


@pytest.mark.parametrize(
    ("scores", "is_rare"),
    [
        ([0.0] * 100, True),
        ([0.01] * 3 + [0.0] * 97, True),
        ([0.01] * 4 + [0.0] * 96, False),
        # Fractions change a little for most examples if one prediction changes, so count the examples that carry the variance.
        ([0.01] * 2 + SMALL[:60] + [0.0] * 38, True),
        ([0.01] * 6 + SMALL[:60] + [0.0] * 34, False),
        ([-0.01] + [-small for small in SMALL[:24]] + [0.0] * 50 + SMALL[:24] + [0.01], False),  # half of them differ
    ],
)
def test_a_difference_of_three_examples_or_fewer_uses_the_rule_of_three(scores: list[float], is_rare: bool) -> None:
    estimated = estimate_mean(np.array([scores]), np.ones(100), 1.0)
    assert (estimated.examples_variance == pytest.approx((3 / 1.645 / 100) ** 2)) is is_rare
    assert estimate_mean(np.array([scores]), np.ones(100)).examples_variance < 1e-6  # a loss has no such bound
