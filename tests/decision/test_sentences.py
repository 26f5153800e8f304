"""Test the sentence of a decision: which ranks, probabilities and bounds it names."""

from __future__ import annotations

from typing import Any

import pytest

from rightrank.decision.comparison import INDEPENDENCE_NOTE
from rightrank.decision.rule import decide_table
from rightrank.decision.sentences import format_number, format_probability
from rightrank.decision.table import build_table
from rightrank.schema.decision import Decision
from tests.decision.tables import build_example_table, build_value_table, make_trial


def decide_losses(losses: dict[int, float], margin: float, confidence: float | None = 0.7, **table: Any) -> Decision:
    return decide_table(build_example_table(losses, **table), margin, confidence=confidence)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({1: 2.3, 4: 2.0, 16: 2.002}, "Rank 4 looks enough (98% likely): it is the best of the ranks tried"),
        (
            {1: 2.3, 4: 2.012, 16: 2.0, 64: 2.002},
            "Rank 4 looks enough (77% likely; rank 16: 98%): it is within 0.02 nats",
        ),
    ],
)
def test_a_larger_rank_is_named_where_it_is_likelier(losses: dict[int, float], expected: str) -> None:
    decision = decide_losses(losses, 0.02, seeds=(0,), noise=0.035)
    assert decision.sentence.startswith(expected)


def test_no_rank_at_the_confidence_names_what_cannot_be_distinguished_and_what_to_take() -> None:
    decision = decide_losses({4: 2.0, 64: 2.003}, 0.005, 0.95, num_examples=100, seeds=(0,), noise=0.05)
    assert decision.sentence == (
        "Ranks 4 and 64 cannot be distinguished (±0.038; the margin is 0.005 nats). Take rank 4: it is 95% likely to be within 0.02 of "
        "the best, and 82% likely to be within the margin."
    )


def test_the_note_says_how_seed_noise_was_measured() -> None:
    table = build_example_table({4: 2.01, 16: 2.0, 64: 2.03}, seeds=(0, 1, 2))

    def get_basis_note(dropped: set[tuple[int, int]]) -> str:
        cells = {
            (rank, lr, seed): cell for (rank, lr, seed), cell in table.cells.items() if (rank, seed) not in dropped
        }
        note = decide_table(type(table)(table.metric, False, cells, {}, table.kind), 0.02).basis_note
        assert note.endswith(f" {INDEPENDENCE_NOTE}")
        return note.removesuffix(f" {INDEPENDENCE_NOTE}")

    moderated = "moderated by the noise expected from the variation between examples."
    start = "Intervals cover the variation over held-out examples and over seeds. "
    assert (
        get_basis_note(set())
        == f"{start}The noise over seeds is measured on each rank's paired difference over 3 seeds and {moderated}"
    )
    adjusted = f"{moderated} Ranks with other seeds are adjusted to the seeds of all ranks."
    assert get_basis_note({(4, 2)}).endswith(f" over 2 to 3 seeds and {adjusted}")
    assert get_basis_note({(4, 2), (64, 1)}).endswith(f" over 2 seeds and {adjusted}")
    alone = {(4, 2), (16, 0), (16, 1), (64, 0), (64, 1)}
    assert (
        get_basis_note(alone)
        == f"{start}No two ranks share two seeds, so the noise over seeds is measured only within single ranks."
    )


def test_counts_of_seeds_are_a_range() -> None:
    table = build_example_table({4: 2.01, 8: 2.02, 16: 2.0, 64: 2.03}, seeds=(0, 1, 2, 3))
    dropped = {(4, 2), (4, 3), (8, 3)}
    cells = {(rank, lr, seed): cell for (rank, lr, seed), cell in table.cells.items() if (rank, seed) not in dropped}
    note = decide_table(type(table)(table.metric, False, cells, {}, table.kind), 0.02).basis_note
    assert " over 2 to 4 seeds and moderated" in note


def test_the_next_lower_rank_has_its_probability_where_it_is_not_shown_to_be_worse() -> None:
    decision = decide_losses({1: 2.3, 4: 2.015, 16: 2.0, 64: 2.002}, 0.02, 0.9, seeds=(0,), noise=0.03)
    chances = {evidence.rank: evidence.probability or 0.0 for evidence in decision.ranks}
    assert decision.rank == 16
    assert (
        f"the best of the ranks tried, and the next lower rank (4) is {format_probability(chances[4])} likely;"
        in decision.sentence
    )


def test_certainty_is_not_claimed() -> None:
    assert [format_probability(value) for value in (0.0, 0.099, 0.1, 0.501, 0.99, 0.991, 1.0)] == [
        "under 10%", "under 10%", "10%", "50%", "99%", "over 99%", "over 99%",
    ]  # fmt: skip


def test_numbers_have_two_digits_and_large_ones_no_decimals() -> None:
    assert [format_number(value) for value in (0.01234, -1.26, 99.4, 100.0, 100.5, 12345.6)] == [
        "0.012", "-1.3", "99", "100", "100", "12346",
    ]  # fmt: skip


def test_one_number_per_rank_may_rise_and_a_stated_deviation_counts() -> None:
    losses = {1: 2.0, 4: 1.9, 16: 1.8}
    assert decide_table(build_value_table(losses), 0.02).verdict == "rising"
    assert decide_table(build_value_table(losses, std=0.05), 0.02).verdict == "rising"
    assert decide_table(build_value_table(losses, std=0.11), 0.02).verdict != "rising"
    assert decide_table(build_value_table(losses), 0.11).verdict != "rising"
    only_lower = build_table(
        [
            make_trial(trial_id=f"{rank}", rank=rank, value=value, seed_deviation=None if rank == 16 else 0.01)
            for rank, value in losses.items()
        ],
        "eval_loss",
        False,
    )
    assert decide_table(only_lower, 0.02).verdict == "rising"  # the best has no deviation


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({1: 2.3, 16: 2.002, 64: 2.0}, "Rank 1 is probably worse."),
        ({1: 2.3, 4: 2.2, 16: 2.002, 64: 2.0}, "Ranks 1 and 4 are probably worse."),
        ({16: 2.002, 64: 2.0}, ""),
    ],
)
def test_the_ranks_that_are_probably_worse_are_named(losses: dict[int, float], expected: str) -> None:
    decision = decide_losses(losses, 0.002, 0.95, num_examples=100, seeds=(0,), noise=0.05)
    assert decision.sentence.startswith("Ranks 16 and 64 cannot be distinguished")
    assert expected in decision.sentence
    assert ("probably worse" in decision.sentence) is bool(expected)


def test_no_gain_is_probable_unless_it_is_sure() -> None:
    losses = {0: 2.001, 4: 2.0, 64: 2.0}
    decision_of_two_seeds, decision_of_one_seed = (
        decide_losses(losses, 0.02, seeds=seeds, noise=0.02) for seeds in ((0, 1), (0,))
    )
    assert decision_of_two_seeds.sentence.startswith("No gain: the base model itself is within 0.02 nats")
    assert decision_of_one_seed.sentence.startswith("No gain: the base model itself is probably within 0.02 nats")
    for decision in (decision_of_two_seeds, decision_of_one_seed):
        assert decision.sentence.count("base model itself") == 1
