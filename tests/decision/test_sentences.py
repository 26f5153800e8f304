"""The answer in words: which ranks, probabilities and bounds a sentence names."""

from __future__ import annotations

from typing import Any

import pytest

from rightrank.decision.comparison import INDEPENDENT
from rightrank.decision.rule import decision_of
from rightrank.decision.sentences import chance, number
from rightrank.decision.table import table_of_results
from rightrank.schema.decision import Decision, Result, ResultsTable
from tests.decision.tables import bare, scored


def answer(losses: dict[int, float], margin: float, confidence: float | None = 0.7, **table: Any) -> Decision:
    return decision_of(scored(losses, **table), margin, confidence=confidence)


def test_a_flat_curve_names_the_rank_that_looks_worst() -> None:
    found = answer({1: 2.0, 4: 2.03}, 0.02, None, items=100, seeds=(0,), noise=0.1)
    assert (found.verdict, found.rank) == ("flat", 1)
    worse = found.ranks[1].difference
    assert (
        f"within 0.02 nats of the best (1); rank 4 looks {worse:.2g} worse, and is not shown to be;" in found.sentence
    )


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ({1: 2.3, 4: 2.0, 16: 2.002}, "Rank 4 looks enough (over 99% likely): it is the best of the ranks tried"),
        (
            {1: 2.3, 4: 2.012, 16: 2.0, 64: 2.002},
            "Rank 4 looks enough (87% likely; rank 16: over 99%): it is within 0.02 nats",
        ),
    ],
)
def test_a_larger_rank_is_named_where_it_is_likelier(losses: dict[int, float], told: str) -> None:
    found = answer(losses, 0.02, seeds=(0,), noise=0.06)
    assert found.sentence.startswith(told)


def test_no_rank_at_the_confidence_names_what_cannot_be_told_apart_and_what_to_take() -> None:
    found = answer({4: 2.0, 64: 2.003}, 0.005, 0.95, items=100, seeds=(0,), noise=0.05)
    assert found.sentence == (
        "Ranks 4 and 64 cannot be told apart (±0.025; the margin is 0.005 nats). Take rank 4: 95% likely to be within 0.0098 of the best, "
        "90% within the margin."
    )


@pytest.mark.parametrize(
    ("losses", "shown"),
    [
        ({2: 2.02, 4: 2.02, 8: 2.01, 16: 2.0, 64: 2.0}, "rank 8 is within 0.02 nats of the best (rank 16), and rank 2"),
        ({2: 2.2, 4: 2.025, 8: 2.02, 16: 2.0, 64: 2.0}, "rank 16 is the best so far, and rank 4"),
    ],
)
def test_an_open_answer_names_what_is_shown_and_the_rank_that_leaves_it_open(
    losses: dict[int, float], shown: str
) -> None:
    found = answer(losses, 0.02, None, items=100, seeds=(0, 1), noise=0.015)
    assert found.sentence.startswith(f"Undecided: {shown} is inconclusive at ")
    assert found.fallback_rank == (8 if "rank 8 is within" in shown else None)


def test_what_the_noise_over_seeds_was_measured_on() -> None:
    table = scored({4: 2.01, 16: 2.0, 64: 2.03}, seeds=(0, 1, 2))

    def note(dropped: set[tuple[int, int]]) -> str:
        cells = {
            (rank, lr, seed): cell for (rank, lr, seed), cell in table.cells.items() if (rank, seed) not in dropped
        }
        said = decision_of(type(table)(table.metric, False, cells, {}, table.kind), 0.02).basis_note
        assert said.endswith(f" {INDEPENDENT}")
        return said.removesuffix(f" {INDEPENDENT}")

    moderated = "moderated by what its variation between examples leads to expect."
    start = "Intervals cover other held-out examples and other seeds. "
    assert (
        note(set()) == f"{start}The noise over seeds is that of each rank's paired difference over 3 seeds, {moderated}"
    )
    assert note({(4, 2)}).endswith(f" over 2 to 3 seeds, {moderated}")
    assert note({(4, 2), (64, 1)}).endswith(f" over 2 seeds, {moderated}")
    alone = {(4, 2), (16, 0), (16, 1), (64, 0), (64, 1)}
    assert (
        note(alone) == f"{start}No two ranks share two seeds, so the noise over seeds is known of single ranks alone."
    )


def test_counts_of_seeds_are_a_range() -> None:
    table = scored({4: 2.01, 8: 2.02, 16: 2.0, 64: 2.03}, seeds=(0, 1, 2, 3))
    dropped = {(4, 2), (4, 3), (8, 3)}
    cells = {(rank, lr, seed): cell for (rank, lr, seed), cell in table.cells.items() if (rank, seed) not in dropped}
    note = decision_of(type(table)(table.metric, False, cells, {}, table.kind), 0.02).basis_note
    assert " over 2 to 4 seeds, moderated" in note


def test_the_next_lower_rank_has_its_probability_where_it_is_not_shown_to_be_worse() -> None:
    found = answer({1: 2.3, 4: 2.015, 16: 2.0, 64: 2.002}, 0.02, 0.9, seeds=(0,), noise=0.06)
    chances = {one.rank: one.probability or 0.0 for one in found.ranks}
    assert found.rank == 16
    assert f"the best of the ranks tried, and the next lower rank (4) is {chance(chances[4])} likely;" in found.sentence


def test_certainty_is_not_claimed() -> None:
    assert [chance(value) for value in (0.0, 0.099, 0.1, 0.501, 0.99, 0.991, 1.0)] == [
        "under 10%", "under 10%", "10%", "50%", "99%", "over 99%", "over 99%",
    ]  # fmt: skip


def test_numbers_have_two_digits_and_large_ones_none_behind_the_point() -> None:
    assert [number(value) for value in (0.01234, -1.26, 99.4, 100.0, 100.5, 12345.6)] == [
        "0.012", "-1.3", "99", "100", "100", "12346",
    ]  # fmt: skip


def test_one_number_a_rank_may_rise_and_a_stated_deviation_is_part_of_the_threshold() -> None:
    losses = {1: 2.0, 4: 1.9, 16: 1.8}
    assert decision_of(bare(losses), 0.02).verdict == "rising"
    assert decision_of(bare(losses, std=0.05), 0.02).verdict == "rising"
    assert decision_of(bare(losses, std=0.11), 0.02).verdict != "rising"
    assert decision_of(bare(losses), 0.11).verdict != "rising"
    only_lower = table_of_results(
        ResultsTable(
            metric="eval_loss",
            higher_is_better=False,
            results=[
                Result(trial_id=f"{rank}", rank=rank, value=value, std=None if rank == 16 else 0.01)
                for rank, value in losses.items()
            ],
            understood=[],
        )
    )
    assert decision_of(only_lower, 0.02).verdict == "rising"  # the best has no deviation


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ({1: 2.3, 16: 2.002, 64: 2.0}, "Rank 1 is probably worse."),
        ({1: 2.3, 4: 2.2, 16: 2.002, 64: 2.0}, "Ranks 1 and 4 are probably worse."),
        ({16: 2.002, 64: 2.0}, ""),
    ],
)
def test_the_ranks_that_are_probably_worse_are_named(losses: dict[int, float], told: str) -> None:
    found = answer(losses, 0.002, 0.95, items=100, seeds=(0,), noise=0.05)
    assert found.sentence.startswith("Ranks 16 and 64 cannot be told apart")
    assert told in found.sentence
    assert ("probably worse" in found.sentence) is bool(told)


def test_no_gain_is_probable_unless_the_bounds_show_it() -> None:
    losses = {0: 2.001, 4: 2.0, 64: 2.0}
    shown, likely = (answer(losses, 0.02, seeds=seeds, noise=0.02) for seeds in ((0, 1), (0,)))
    assert [(found.verdict, found.grade) for found in (shown, likely)] == [("no_gain", "shown"), ("no_gain", "likely")]
    assert shown.sentence.startswith("No gain: the base itself is within 0.02 nats")
    assert likely.sentence.startswith("No gain: the base itself is probably within 0.02 nats")
    for found in (shown, likely):
        assert found.sentence.count("base itself") == 1
