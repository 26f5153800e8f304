from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from rightrank.decision.comparison import walk_down
from rightrank.decision.rule import decide_table
from rightrank.decision.table import Cell, ScoreTable
from rightrank.schema.errors import ResultsError
from tests.decision.tables import build_example_table, build_value_table

RISING = {1: 2.4, 2: 2.3, 4: 2.2, 8: 2.1}
SATURATED = {1: 2.3, 4: 2.05, 16: 2.001, 64: 2.0}


def test_the_smallest_rank_within_the_margin_is_named_with_its_evidence() -> None:
    decision = decide_table(build_example_table(SATURATED), 0.01)
    assert (decision.rank, decision.verdict, decision.reference_rank) == (16, "saturated", 64)
    assert {e.rank: e.non_inferior for e in decision.ranks} == {1: False, 4: False, 16: True, 64: True}
    assert decision.flags == []
    assert "16" in decision.sentence
    assert decision.next_runs[0].action == "test"


def test_a_stated_deviation_can_settle_what_bare_numbers_cannot() -> None:
    decision = decide_table(build_value_table(SATURATED, std=0.0003), 0.005)
    assert decision.rank == 16
    assert "underpowered" not in decision.flags
    assert decision.basis == "std"


def test_the_verdict_is_rising_if_the_top_beats_all_others() -> None:
    for table in (build_value_table(RISING), build_example_table(RISING)):
        decision = decide_table(table, 0.01)
        assert (decision.rank, decision.verdict) == (8, "rising")
        run = decision.next_runs[0]
        assert (run.action, run.ranks) == ("rank", [16])


def test_noise_as_wide_as_the_margin_is_undecided_and_names_a_run_that_would_settle_it() -> None:
    table = build_example_table({1: 2.3, 4: 2.006, 16: 2.001, 64: 2.0}, num_examples=60, noise=0.1)
    decision = decide_table(replace(table, kind="accuracy"), 0.01, confidence=0.99)
    assert (decision.rank, decision.verdict) == (None, "undecided")
    assert "underpowered" in decision.flags
    run = decision.next_runs[0]
    assert run.action in ("examples", "seeds")
    assert (run.examples or 0) > 60 or (run.seeds or 0) > 3


def test_a_low_rank_that_came_out_best_by_luck_is_not_taken() -> None:
    decision = decide_table(
        build_example_table({1: 2.0, 4: 2.002, 16: 2.001}, num_examples=30, noise=0.1, seeds=(0, 1)), 0.005
    )
    assert (decision.rank, decision.verdict) == (None, "undecided")


def test_overfitting_needs_both_conditions() -> None:
    losses = {1: 2.1, 4: 2.0, 16: 2.1, 64: 2.2}
    better = {1: 1.9, 4: 1.8, 16: 1.5, 64: 1.2}
    worse = {1: 1.9, 4: 1.8, 16: 1.9, 64: 2.1}
    assert decide_table(build_example_table(losses, train=better), 0.01).verdict == "overfitting"
    assert decide_table(build_example_table(losses, train=worse), 0.01).verdict == "saturated"
    assert decide_table(build_example_table(losses), 0.01).verdict == "saturated"


@pytest.mark.parametrize(
    ("ranks", "reference", "non_inferior_ranks", "chosen"),
    [
        ([64, 1, 16, 4], 64, {16, 4}, 4),  # any order
        ([1, 4, 16, 64], 64, {1, 4}, 64),  # the next lower rank fails
        ([1, 4, 16, 64], 64, {1, 16}, 16),  # 1 is not reached past 4
        ([0, 1, 4, 16, 64], 16, {0, 1, 4, 64}, 1),  # neither the base nor a rank above the reference
        ([4], 4, set(), 4),
    ],
)
def test_the_walk_down_ends_above_the_first_rank_that_fails(
    ranks: list[int], reference: int, non_inferior_ranks: set[int], chosen: int
) -> None:
    assert walk_down(ranks, reference, lambda rank: rank in non_inferior_ranks) == chosen


def test_higher_is_better_mirrors_lower() -> None:
    mirrored = decide_table(
        build_value_table({rank: -value for rank, value in SATURATED.items()}, "reward", higher=True), 0.005
    )
    assert mirrored.rank == decide_table(build_value_table(SATURATED), 0.005).rank
    assert all(e.low <= e.value <= e.high for e in mirrored.ranks)


def test_perplexity_is_judged_through_its_logarithm() -> None:
    decision = decide_table(build_value_table({1: 8.0, 4: 7.42, 16: 7.40, 64: 7.39}, "eval_perplexity"))
    assert decision.margin == pytest.approx(7.39 * 0.005)
    assert decision.rank == 4
    evidence = next(e for e in decision.ranks if e.rank == 4)
    assert evidence.value == pytest.approx(7.42)
    assert evidence.difference == pytest.approx(0.03, rel=1e-6)


@pytest.mark.parametrize(
    ("metric", "higher", "best", "margin"),
    [("eval_loss", False, 2.0, 0.005), ("accuracy", True, 0.9, 0.005), ("accuracy", True, 90.0, 0.5)],
)  # fmt: skip
def test_default_margins(metric: str, higher: bool, best: float, margin: float) -> None:
    worse = best * (0.9 if higher else 1.1)
    assert decide_table(build_value_table({1: worse, 4: best}, metric, higher)).margin == pytest.approx(margin)


def test_a_best_learning_rate_at_the_edge_is_flagged_and_the_next_one_named() -> None:
    cells = {
        (rank, learning_rate, 0): Cell("t", 0.0, *_one(2.0 + 0.1 / rank - 10 * learning_rate))
        for rank in (1, 4)
        for learning_rate in (1e-3, 3e-3)
    }
    decision = decide_table(ScoreTable("loss", False, cells), 0.005)
    assert "lr_edge" in decision.flags
    run = next(run for run in decision.next_runs if run.action == "rates")
    assert run.learning_rates == [pytest.approx(9e-3)]


@pytest.mark.parametrize(
    ("rates", "slope", "suggested"),
    [
        ((1e-3, 3e-3, 1e-2), -1, 3e-2),  # instead of 0.0333…
        ((1e-3, 3e-3, 1e-2), 1, 3e-4),
        ((2e-4, 4e-4), -1, 8e-4),
        ((1e-4, 1.2e-4), -1, 1.44e-4),  # a round number would be the same rate
    ],
)
def test_a_suggested_learning_rate_is_a_round_number(rates: Sequence[float], slope: int, suggested: float) -> None:
    cells = {(rank, rate, 0): Cell("t", 0.0, *_one(2.0 + slope * rate)) for rank in (1, 4) for rate in rates}
    run = next(run for run in decide_table(ScoreTable("loss", False, cells), 1e-6).next_runs if run.action == "rates")
    assert run.learning_rates == [pytest.approx(suggested)]


def test_a_suggested_learning_rate_is_one_that_another_rank_has() -> None:
    rates = {1: (1e-3, 3e-3, 1e-2, 3.1e-2), 4: (1e-3, 3e-3, 1e-2)}
    cells = {
        (rank, rate, 0): Cell("t", 0.0, *_one(2.0 - rank * min(rate, 0.011)))
        for rank, of_rank in rates.items()
        for rate in of_rank
    }
    run = next(run for run in decide_table(ScoreTable("loss", False, cells), 1e-3).next_runs if run.action == "rates")
    assert (run.ranks, run.learning_rates) == ([4], [3.1e-2])


def test_one_rank_or_a_margin_of_zero_is_refused() -> None:
    with pytest.raises(ResultsError, match="two or more"):
        decide_table(build_value_table({4: 2.0}))
    with pytest.raises(ResultsError, match=r"margin: got 0\.0; give a share"):
        decide_table(build_value_table(SATURATED), 0.0)


def _one(loss: float) -> tuple[object, object]:
    import numpy as np

    return np.array([loss]), np.ones(1)


@pytest.mark.parametrize(
    ("losses", "std", "is_shown", "is_lower_refuted", "is_underpowered"),
    [
        ({1: 2.0, 4: 1.81, 16: 1.8}, 0.001, True, False, False),
        ({1: 2.0, 4: 1.81, 16: 1.8}, 0.01, None, False, True),  # the chosen rank is not shown to be enough
        ({1: 1.825, 4: 1.81, 16: 1.8}, 0.003, True, None, True),  # the next lower rank is not shown to be too small
        ({4: 1.81, 16: 1.8}, 0.001, True, None, False),  # there is no lower rank
    ],
)
def test_stated_deviations_may_be_too_wide_for_the_answer(
    losses: dict[int, float], std: float, is_shown: bool | None, is_lower_refuted: bool | None, is_underpowered: bool
) -> None:
    decision = decide_table(build_value_table(losses, std=std), 0.02)
    judged = {1: None} | {evidence.rank: evidence.non_inferior for evidence in decision.ranks}
    assert decision.rank == 4
    assert (judged[4], judged[1]) == (is_shown, is_lower_refuted)
    assert ("underpowered" in decision.flags) is is_underpowered
    assert decide_table(build_value_table(losses), 0.02).flags == ["underpowered", "one_seed"]
