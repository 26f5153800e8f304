"""The one comparison: enough, not enough or cannot tell; one rule at the margin, and no bound of zero width."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from rightrank.decision.comparison import (
    Bounds,
    Estimate,
    binary_bound,
    bounds_of,
    bounds_of_files,
    estimate,
    estimate_of_files,
    examples_needed,
    is_within,
    span_of,
    t_quantile,
    t_tail,
)
from rightrank.decision.rule import decision_of
from rightrank.decision.seeds import seed_parts, winners_gap
from rightrank.decision.table import Cell, minus, table_of
from rightrank.report.evidence_tables import build_evidence_table
from rightrank.schema.metrics import MetricKind
from rightrank.schema.trials import TrialFinished
from tests.decision.tables import build_value_table
from tests.tiny import UNMEASURED


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-1.0, 0.4, True), (-1.0, 0.5, True), (-1.0, 0.6, None), (0.5, 0.6, None), (0.51, 0.6, False)],
)
def test_a_bound_at_the_margin_is_within_it(low: float, high: float, expected: bool | None) -> None:
    assert Bounds(0.0, low, high).is_enough(0.5) is expected


def test_the_tolerance_is_of_the_margin_and_not_of_one() -> None:
    assert is_within(0.1 + 0.2 - 0.3 + 0.05, 0.05)  # rounding
    assert not is_within(0.9e-12, 1e-14)
    decision = decision_of(build_value_table({4: 1.9e-12, 16: 1.0e-12}, metric="mse"), 1e-14)
    assert decision.rank == 16


def test_a_difference_at_the_margin_has_one_word_on_a_page() -> None:
    decision = decision_of(build_value_table({4: 0.745, 8: 0.75, 16: 0.75}, metric="accuracy", higher=True), 0.005)
    assert decision.rank == 4
    (row,) = [row for row in build_evidence_table(decision) if row[0] == "4"]
    assert "perhaps" in row


@pytest.mark.parametrize("examples", [13, 30, 200])
def test_where_no_example_differs_the_bound_is_about_three_over_their_number(examples: int) -> None:
    ones = np.ones(examples)
    for found in (bounds_of_files(0 * ones, ones, 1.0), bounds_of(estimate(0 * ones[None, :], ones, 1.0))):
        assert found.high == pytest.approx(3 / examples, rel=0.12)
        assert found.low == pytest.approx(-found.high, rel=1e-9)
        assert found.is_enough(0.01) is (True if examples > 300 else None)
    assert bounds_of_files(0 * ones, ones).high == 0.0  # losses that are equal to the bit are of one function


@pytest.mark.parametrize("span", [1.0, 100.0])
def test_right_and_wrong_answers_of_two_files_have_the_bounds_of_two_shares(span: float) -> None:
    sums, ones = span * np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 33), np.ones(44)
    found = bounds_of_files(sums, ones, span)
    assert found.mean == pytest.approx(span * 7 / 44)
    assert found.high == pytest.approx(span * binary_bound(9, 2, 44, 0.95))
    assert found.low == pytest.approx(-span * binary_bound(2, 9, 44, 0.95))


@pytest.mark.parametrize("other", ["a share", "weights", "losses", "another span"])
def test_other_scores_of_two_files_have_those_of_a_mean(other: str) -> None:
    sums, weights, span = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 33), np.ones(44), 1.0
    if other == "a share":
        sums[0] = 0.5
    elif other == "weights":
        sums, weights = 2 * sums, 2 * weights
        span = 2.0
    else:
        span = 0.0 if other == "losses" else 2.0
    expected = bounds_of(estimate_of_files(sums, weights, span))
    assert bounds_of_files(sums, weights, span) == expected
    assert expected.high != pytest.approx(binary_bound(9, 2, 44, 0.95))


def test_few_examples_that_differ_widen_the_bounds_of_two_files_of_bounded_scores() -> None:
    scores = np.array([0.5] + [0.0] * 99)
    bounded, losses = bounds_of_files(scores, np.ones(100), 1.0), bounds_of_files(scores, np.ones(100))
    assert bounded.high >= 0.005 + 3 / 100
    assert bounded.high > 1.5 * losses.high


@pytest.mark.parametrize("degrees", [1.0, 1.3, 2.0, 4.7, 19.0, 200.5, 1e6])
def test_student_s_t_is_that_of_scipy(degrees: float) -> None:
    for probability in (0.001, 0.05, 0.3, 0.5, 0.7, 0.95, 0.975, 0.999999):
        expected = stats.t.ppf(probability, degrees)
        assert t_quantile(degrees, probability) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    for x in (0.0, 0.4, 3.0, 40.0):
        assert t_tail(degrees, x)[0] == pytest.approx(stats.t.sf(x, degrees), abs=1e-10)


def test_select_by_a_score_of_thirty_zeros_shows_nothing() -> None:
    trials = [
        TrialFinished(
            trial_id=f"{rank}", rank=rank, learning_rate=1e-3, lora_alpha=32, seed=0, steps=10, value=0.0,
            metrics={"f1": 0.0}, example_metrics={"f1": [0.0] * 30}, **UNMEASURED,
        )
        for rank in (4, 16)
    ]  # fmt: skip
    decision = decision_of(table_of(trials, "f1", True))
    assert decision.ranks[1].difference_high == pytest.approx(0.1, rel=0.1)
    assert decision.verdict == "undecided"


@pytest.mark.parametrize(("worse", "better"), [(9, 1), (1, 9), (3, 0), (0, 4)])
def test_the_binary_bound_inverts_the_score_test(worse: int, better: int) -> None:
    """At the bound, the observed difference is z standard errors away, which are those of the likeliest shares with that difference."""
    examples = 44
    bound = binary_bound(worse, better, examples, 0.95)
    shares = np.linspace(max(0.0, -bound) + 1e-9, (1 - bound) / 2 - 1e-9, 200_001)  # of pairs that differ downward
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
    found = estimate_of_files(scores, np.ones(80))
    assert found.kurtosis == pytest.approx(stats.kurtosis(scores, fisher=False))
    reach = stats.t.ppf(0.95, found.degrees) * found.standard_error
    assert bounds_of(found).low == pytest.approx(found.mean - reach)  # skewed upward: the lower bound is plain
    assert bounds_of(found).high > found.mean + reach
    assert found.degrees < 79
    mild = estimate_of_files(np.random.default_rng(0).gamma(20, 1, 80), np.ones(80))
    assert bounds_of(mild).high > mild.mean + 1.001 * stats.t.ppf(0.95, mild.degrees) * mild.standard_error
    small = estimate_of_files(scores / 100, np.ones(80))  # in another unit
    assert (small.kurtosis, small.degrees) == pytest.approx((found.kurtosis, found.degrees))
    assert estimate_of_files(np.zeros(80), np.ones(80)).kurtosis == estimate(np.zeros((1, 80)), np.ones(80)).kurtosis


def test_examples_needed_count_a_worse_difference_too() -> None:
    found = estimate_of_files(np.random.default_rng(1).normal(0.03, 0.2, 100), np.ones(100))
    assert examples_needed(found, 0.05) is not None
    assert examples_needed(found, found.mean / 2) is not None
    assert examples_needed(found, found.mean) is None


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


def test_the_difference_of_two_cells_is_how_much_worse_one_is_on_each_example() -> None:
    weights = np.array([1.0, 3.0])
    one = Cell("one", 0.7, np.array([3.0, 1.0]), weights, 1.0)
    found = minus(one, Cell("other", 0.5, np.array([1.0, 2.0]), weights, 2.0))
    assert (found.trial_id, found.value, found.span) == ("one", pytest.approx(0.2), 2.0)
    assert (found.sums.tolist(), found.weights.tolist()) == ([2.0, -1.0], [1.0, 3.0])


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
        ("accuracy", [1.5, 0.1], 1.0, 1.0),  # shares exceed 1 one by one
    ],
)
def test_the_range_of_a_score(kind: MetricKind, sums: list[float], weights: object, span: float) -> None:
    assert span_of(kind, sums, np.asarray(weights)) == span


def test_each_part_of_the_variance_scales_with_what_it_is_of() -> None:
    found = Estimate(0.1, 0.04, 0.09, 0.01, 100, 3, 2.0, 0.5, 4.0)
    larger = found.at(200, 6)
    assert (larger.mean, larger.skewness, larger.kurtosis) == (0.1, 0.5, 4.0)
    assert (larger.examples, larger.seeds, larger.seeds_degrees) == (200, 6, 5.0)
    parts = (larger.examples_variance, larger.seeds_variance, larger.interaction_variance)
    assert parts == pytest.approx((0.015 + 0.0025, 0.04 + 0.0025, 0.0025))
    assert found.at(1, 3).examples_variance == pytest.approx(4.0)
    assert found.at(0, 3).examples_variance == pytest.approx(0.04)
    for examples, expected in ((0, 0.04), (1, 0.04), (2, 0.02)):
        assert replace(found, examples=examples).at(4, 3).examples_variance == pytest.approx(expected)
    assert replace(found, seeds_degrees=0.0).at(100, 9).seeds_degrees == 0.0
    assert replace(found, seeds_degrees=1.0, seeds=2).at(100, 4).seeds_degrees == 3.0
    assert found.at(100, 1).seeds_degrees == 1.0
    assert found.at(200, 3).grouped_degrees is None
    grouped = replace(found, grouped_degrees=9.0)
    assert [grouped.at(examples, 3).grouped_degrees for examples in (100, 200, 5)] == [9.0, 18.0, 1.0]


def test_a_settled_difference_needs_the_next_larger_set_of_examples() -> None:
    found = estimate_of_files(np.random.default_rng(2).normal(0.0, 0.2, 100), np.ones(100))
    assert examples_needed(found, 5.0) == 120


def test_the_degrees_of_an_estimate_are_those_of_its_seeds() -> None:
    build_value_table = estimate(np.array([[1.0], [3.0]]), np.ones(1))
    assert (build_value_table.mean, build_value_table.seeds_variance, build_value_table.examples, build_value_table.seeds, build_value_table.seeds_degrees, build_value_table.skewness) == (
        2,
        1,
        0,
        2,
        1,
        0,
    )
    scores = np.random.default_rng(3).normal(0.0, 1.0, (3, 50))
    assert estimate(scores, np.ones(50)).seeds_degrees == 2.0
    one = estimate(scores[:1], np.ones(50))
    assert (one.seeds_degrees, one.seeds_variance, one.interaction_variance) == (0.0, 0.0, 0.0)


def test_a_rare_difference_in_percent_is_that_of_a_fraction_in_another_unit() -> None:
    sums = np.array([[1.0] + [0.0] * 99])
    fraction, percent = estimate(sums, np.ones(100), 1.0), estimate(100 * sums, np.ones(100), 100.0)
    assert percent.bound(0.95) == pytest.approx(100 * fraction.bound(0.95))
    assert percent.examples_variance == pytest.approx(100**2 * fraction.examples_variance)


SMALL = np.linspace(1e-7, 2e-6, 60).tolist()


@pytest.mark.parametrize(
    ("scores", "is_rare"),
    [
        ([0.0] * 100, True),
        ([0.01] * 3 + [0.0] * 97, True),
        ([0.01] * 4 + [0.0] * 96, False),
        # shares, of which one other prediction moves most a little: what counts is how many carry the variance
        ([0.01] * 2 + SMALL[:60] + [0.0] * 38, True),
        ([0.01] * 6 + SMALL[:60] + [0.0] * 34, False),
        ([-0.01] + [-small for small in SMALL[:24]] + [0.0] * 50 + SMALL[:24] + [0.01], False),  # half of them differ
    ],
)
def test_where_three_examples_or_fewer_carry_a_difference_the_rule_of_three_is_its_error(
    scores: list[float], is_rare: bool
) -> None:
    found = estimate(np.array([scores]), np.ones(100), 1.0)
    assert (found.examples_variance == pytest.approx((3 / 1.645 / 100) ** 2)) is is_rare
    assert estimate(np.array([scores]), np.ones(100)).examples_variance < 1e-6  # a loss has no such bound
