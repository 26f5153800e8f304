"""Test the sentence of a decision: which ranks, probabilities and bounds it names."""

from __future__ import annotations

from typing import Any

import pytest

from rightrank.decision.rule import decide_table, format_number, format_probability
from rightrank.decision.table import build_table
from rightrank.schema.results import Decision
from tests.decision.tables import build_example_table, build_value_table, make_trial


def decide_losses(losses: dict[int, float], margin: float, confidence: float | None = 0.7, **table: Any) -> Decision:
    return decide_table(build_example_table(losses, **table), margin, confidence=confidence)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (
            {1: 2.3, 4: 2.0, 16: 2.002},
            "Rank 4 looks enough (98% likely): the best of those tried; rank 1 is 0.3 worse;",
        ),
        (
            {1: 2.3, 4: 2.012, 16: 2.0, 64: 2.002},
            "Rank 4 looks enough (77% likely): within 0.02 nats of the best (rank 16); rank 1 is 0.3 worse;",
        ),
    ],
)
def test_an_answer_names_its_probability_the_best_and_the_next_lower_rank(
    losses: dict[int, float], expected: str
) -> None:
    decision = decide_losses(losses, 0.02, seeds=(0,), noise=0.035)
    assert decision.sentence.startswith(expected)


def test_no_rank_at_the_confidence_names_what_to_take() -> None:
    decision = decide_losses({4: 2.0, 64: 2.003}, 0.005, 0.95, num_examples=100, seeds=(0,), noise=0.05)
    assert decision.sentence == (
        "Undecided: no rank is 95% likely to be within 0.005 nats of the best. Take rank 4, the likeliest (82%): it is 95% likely to be "
        "within 0.02."
    )


def test_the_next_lower_rank_has_its_probability_where_it_is_not_shown_to_be_worse() -> None:
    decision = decide_losses({1: 2.3, 4: 2.015, 16: 2.0, 64: 2.002}, 0.02, 0.9, seeds=(0,), noise=0.03)
    chances = {evidence.rank: evidence.probability or 0.0 for evidence in decision.ranks}
    assert decision.rank == 16
    assert f"the best of those tried; rank 4 is {format_probability(chances[4])} likely;" in decision.sentence


def test_certainty_is_not_claimed() -> None:
    assert [format_probability(value) for value in (0.0, 0.099, 0.1, 0.501, 0.99, 0.991, 1.0)] == [
        "under 10%", "under 10%", "10%", "50%", "99%", "over 99%", "over 99%",
    ]  # fmt: skip


def test_numbers_have_two_digits_and_large_ones_no_decimals() -> None:
    assert [format_number(value) for value in (0.01234, -1.26, 99.4, 100.0, 100.5, 12345.6)] == [
        "0.012", "-1.3", "99", "100", "100", "12346",
    ]  # fmt: skip


def test_a_stated_deviation_counts_where_results_rise() -> None:
    losses = {1: 2.0, 4: 1.9, 16: 1.8}
    assert decide_table(build_value_table(losses, std=0.05), 0.02).verdict == "rising"
    assert decide_table(build_value_table(losses, std=0.11), 0.02).verdict != "rising"
    only_lower = build_table(
        [
            make_trial(trial_id=f"{rank}", rank=rank, value=value, seed_deviation=None if rank == 16 else 0.01)
            for rank, value in losses.items()
        ],
        "eval_loss",
        False,
    )
    assert decide_table(only_lower, 0.02).verdict == "rising"  # the best has no deviation


def test_no_gain_is_said_with_its_bounds() -> None:
    losses = {0: 2.001, 4: 2.0, 64: 2.0}
    decision_of_two_seeds, decision_of_one_seed = (
        decide_losses(losses, 0.02, seeds=seeds, noise=0.02) for seeds in ((0, 1), (0,))
    )
    assert decision_of_two_seeds.sentence.startswith(
        "No gain shown: rank 4 gained +0.0013 over the base (90% interval -0.006 to +0.0077)"
    )
    assert decision_of_one_seed.sentence.startswith("No gain shown: rank 4 gained +")
