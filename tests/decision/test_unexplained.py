"""Test a larger rank that is clearly worse than the best: either its training failed or the ranks overfit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from rightrank.decision.rule import decide_table
from rightrank.decision.table import ScoreTable, build_table
from rightrank.schema.results import Decision
from tests.decision.tables import build_example_table, build_value_table, make_trial

DIVERGED = {1: 2.1, 4: 2.0, 16: 1.995, 64: 11.3}
RAISED = {1: 2.3, 4: 2.012, 16: 2.002, 64: 2.6}  # rank 64 is at 2.0 plus .6
FLAG = "larger_rank_worse"


def build_seed_table(
    losses: Mapping[int, float], seeds: Sequence[int] = (0, 1), rates: Sequence[float] = (1e-3,), worse: float = 0.01
) -> ScoreTable:
    """Build a table with one number per training, where the lower learning rates are worse by `worse`."""
    results = [
        make_trial(
            trial_id=f"{rank}-{rate}-{seed}",
            rank=rank,
            learning_rate=rate if rank else 0.0,
            seed=seed,
            value=loss + 0.0005 * seed * (rank % 3) + worse * (rate < max(rates)),
        )
        for rank, loss in losses.items()
        for rate in (rates if rank else (0.0,))
        for seed in (seeds if rank else (0,))
    ]
    return build_table(results, "eval_loss", False)


def require_repeat(decision: Decision, rank: int) -> None:
    assert (decision.rank, decision.verdict) == (None, "undecided")
    assert FLAG in decision.flags
    assert decision.sentence.startswith(f"Undecided: rank {rank} is ")
    assert "its training may have failed" in decision.sentence
    assert (decision.next_runs[0].ranks, decision.next_runs[0].trials) == ([rank], 1)
    assert decision.next_run.startswith(f"Train rank {rank} again")


@pytest.mark.parametrize(
    ("table", "margin"),
    [
        (build_seed_table({0: 3.0, **DIVERGED}), 0.02),
        (build_seed_table(DIVERGED), 0.02),
        (build_seed_table(DIVERGED, seeds=(0, 1, 2)), 0.02),
        (build_value_table(DIVERGED), 0.02),
        (build_value_table(DIVERGED, std=0.001), 0.02),
        (build_value_table({1: 0.7, 4: 0.85, 16: 0.856, 64: 0.02}, "accuracy", higher=True), 0.01),
        (build_example_table(RAISED, seeds=(0,)), 0.02),
        (build_example_table(RAISED, seeds=(0, 1)), 0.02),
        (build_example_table({0: 3.0, **DIVERGED}, seeds=(0, 1)), 0.02),
    ],
    ids=["base", "seeds", "three seeds", "values", "stated", "accuracy", "one seed", "two seeds", "examples"],
)
def test_a_larger_rank_that_failed_leaves_the_answer_undecided(table: ScoreTable, margin: float) -> None:
    decision = decide_table(table, margin)
    require_repeat(decision, 64)
    if "inconclusive" not in decision.sentence:
        assert "Without it, rank 4 looks enough" in decision.sentence


def test_a_failed_rank_is_repeated_at_a_lower_rate_or_with_another_seed() -> None:
    lower, seed = (
        decide_table(table, 0.02).next_runs[0]
        for table in (build_seed_table(DIVERGED), build_two_rate_table(RAISED, seeds=(0,)))
    )
    assert (lower.action, lower.learning_rates) == ("rates", [pytest.approx(1e-3 / 3, rel=0.15)])
    assert "now 0.001)" in lower.sentence
    assert (seed.action, seed.seeds, seed.trials) == ("seeds", 2, 1)
    assert (
        decide_table(build_value_table(DIVERGED), 0.02).next_run
        == "Train rank 64 again at a lower learning rate: it may have failed."
    )


def build_two_rate_table(losses: Mapping[int, float], seeds: Sequence[int]) -> ScoreTable:
    best = build_example_table(losses, seeds=seeds)
    lower = {(rank, 3e-4, seed): replace(cell, sums=cell.sums + 0.05) for (rank, _, seed), cell in best.cells.items()}
    return replace(best, cells={**best.cells, **lower})


def test_two_seeds_and_a_lower_rate_show_that_a_rank_is_worse() -> None:
    for table in (build_two_rate_table(RAISED, seeds=(0, 1)), build_seed_table(DIVERGED, rates=(3e-4, 1e-3))):
        decision = decide_table(table, 0.02)
        assert (decision.rank, decision.verdict) == (4, "saturated")
        assert FLAG not in decision.flags


@pytest.mark.parametrize(
    "losses",
    [
        {4: 0.331, 8: 0.361, 16: 0.396, 64: 0.499, 128: 0.541},  # DistilBERT on IMDB at its last evaluation
        {1: 2.12, 2: 2.03, 4: 2.0, 8: 2.03, 16: 2.12},
        {1: 2.05, 4: 2.0, 16: 2.05, 64: 2.2},
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_ranks_that_get_worse_one_after_the_other_overfit(losses: dict[int, float], train: bool) -> None:
    training = {rank: 1.9 - 0.001 * rank for rank in losses} if train else None
    best = min(losses, key=lambda rank: losses[rank])
    for table in (
        build_example_table(losses, train=training, seeds=(0, 1)),
        build_example_table(losses, train=training, seeds=(0,)),
    ):
        decision = decide_table(table, 0.01)
        assert decision.rank == best
        assert decision.verdict == ("overfitting" if train else "saturated")
        assert FLAG not in decision.flags


def test_a_rank_that_learns_more_overfits_however_much_worse_it_is() -> None:
    training = {1: 1.9, 4: 1.8, 16: 1.7, 64: 1.2}
    for seeds in ((0,), (0, 1)):
        assert decide_table(build_example_table(RAISED, seeds=seeds, train=training), 0.02).verdict == "overfitting"
        diverged = {**training, 64: 9.0}
        require_repeat(decide_table(build_example_table(RAISED, seeds=seeds, train=diverged), 0.02), 64)
