"""Test the limits of what a decision claims.

The limits come from one seed, unshared seeds, untried learning rates, rising curves and unequal lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightrank.decision.comparison import estimate_mean
from rightrank.decision.evidence import Evidence
from rightrank.decision.rule import decide_table
from rightrank.decision.table import Cell, ScoreTable, build_table
from rightrank.schema.results import Decision
from rightrank.schema.trials import Arm
from rightrank.search.strategies import STRATEGIES
from tests.decision.tables import build_example_table, build_value_table
from tests.search import worlds
from tests.search.worlds import make_space, run_all

SATURATED = {1: 2.3, 4: 2.05, 16: 2.001, 64: 2.0}
OTHERS = {
    "saturated": SATURATED,
    "rising": {1: 2.4, 4: 2.2, 16: 2.1, 64: 2.0},
    "flat": {1: 2.0003, 4: 2.0002, 16: 2.0001, 64: 2.0},
    "no_gain": {0: 2.0001, 1: 2.0002, 4: 2.0},
}


def decide_losses(losses: dict[int, float], seeds: Sequence[int] = (0,), **options: object) -> Decision:
    return decide_table(build_example_table(losses, seeds=seeds, **options), 0.01)  # type: ignore[arg-type]


@pytest.mark.parametrize("verdict", OTHERS)
def test_one_seed_gives_an_indication(verdict: str) -> None:
    decision = decide_losses(OTHERS[verdict])
    assert (decision.verdict, decision.confidence) == (verdict, None)
    assert "one_seed" in decision.flags
    assert "confidence" not in decision.sentence
    assert "one seed is an indication" in decision.sentence
    assert "noise over seeds is unknown" in decision.basis_note
    if verdict != "no_gain":
        run = next(run for run in decision.next_runs if run.action == "seeds")
        assert (run.seeds or 0) >= 2
        assert "to confirm it" in run.sentence


def test_the_rank_of_one_seed_rests_on_the_bounds_over_examples() -> None:
    table = build_example_table(SATURATED, seeds=(0,))
    decision = decide_table(table, 0.01)
    cells = [table.cells[rank, 1e-3, 0] for rank in (4, decision.reference_rank)]
    over_examples = estimate_mean((cells[0].sums - cells[1].sums)[None, :], cells[0].weights)
    evidence = next(evidence for evidence in decision.ranks if evidence.rank == 4)
    assert evidence.difference_high == pytest.approx(over_examples.compute_bound(0.95))
    assert (decision.rank, evidence.non_inferior) == (16, False)


def test_two_seeds_give_a_decision_with_a_confidence() -> None:
    decision = decide_losses(SATURATED, (0, 1), noise=0.004)
    assert (decision.rank, decision.confidence) == (16, 0.95)
    assert "one_seed" not in decision.flags
    assert "is enough" in decision.sentence
    evidence = next(evidence for evidence in decision.ranks if evidence.rank == 16)
    assert evidence.difference_high is not None
    assert (evidence.difference or 0.0) < evidence.difference_high


def build_measured_table(
    differences: dict[int, list[float]], spread: dict[int, float], examples: int = 300
) -> ScoreTable:
    """Build a table with rank 64 at 2 and the others at these differences by seed, with this deviation between examples."""
    generator = np.random.default_rng(5)
    level = 2 + 0.5 * generator.standard_normal(examples)
    cells = {}
    for rank, by_seed in {64: [0.0] * len(next(iter(differences.values()))), **differences}.items():
        for seed, difference in enumerate(by_seed):
            noise = generator.standard_normal(examples)
            scores = level + difference + spread.get(rank, 0.0) * (noise - noise.mean()) / noise.std()
            cells[rank, 1e-3, seed] = Cell(f"{rank}-{seed}", float(scores.mean()), scores, np.ones(examples))
    return ScoreTable("loss", False, cells)


def test_a_noisy_rank_does_not_widen_the_bound_of_a_quiet_one() -> None:
    """Keep the bound narrow: a difference of .0006 ± .0011 once got a bound of .012 and a request for 28 seeds."""
    noisy = {1: [0.7166, 0.1066, 0.2276], 16: [0.0006, 0.0017, -0.0005]}
    decision = decide_table(build_measured_table(noisy, {1: 0.75, 16: 0.019}), 0.01)
    quiet = next(evidence for evidence in decision.ranks if evidence.rank == 16)
    assert quiet.difference_high is not None
    assert quiet.difference_high < 0.006
    loud = next(evidence for evidence in decision.ranks if evidence.rank == 1)
    assert loud.difference_low is not None
    assert loud.difference_low < 0.2
    assert all((run.seeds or 0) <= 8 for run in decision.next_runs)


def test_a_best_learning_rate_is_chosen_on_shared_seeds() -> None:
    losses = {
        (16, 1e-3): {0: 6.0598, 1: 6.0617, 2: 6.0624},
        (16, 3e-3): {0: 6.0608},
        (64, 1e-3): {0: 6.0590, 1: 6.0611, 2: 6.0619},
    }
    cells = {
        (rank, lr, seed): Cell(f"{rank} {lr} {seed}", loss, np.array([loss]), np.ones(1))
        for (rank, lr), by_seed in losses.items()
        for seed, loss in by_seed.items()
    }
    evidence = Evidence(ScoreTable("loss", False, cells))
    assert evidence.contenders[16].learning_rate == 1e-3
    assert len(evidence.contenders[16].cells) == 3
    decision = decide_table(ScoreTable("loss", False, cells), 0.02)
    assert (decision.rank, decision.confidence) == (16, 0.95)


class FlatWorld(worlds.World):
    """A world in which the smallest rank is the best."""

    def loss(self, arm: Arm) -> float:
        return super().loss(arm.model_copy(update={"rank": 1})) + 1e-5 * arm.rank if arm.rank else super().loss(arm)


@pytest.mark.parametrize(
    ("rates", "best", "is_flagged", "suggested"),
    [
        ((1e-4, 3e-4, 1e-3), 1e-1, True, 3e-3),
        ((3e-4, 1e-3, 3e-3), 1e-6, True, 9e-5),
        ((1e-4, 3e-4, 1e-3), 3e-4, False, 0),
    ],
)
def test_a_search_that_ends_at_its_highest_or_lowest_learning_rate_is_flagged(
    rates: tuple[float, ...], best: float, is_flagged: bool, suggested: float
) -> None:
    """Compare with all learning rates of the run."""
    trials = run_all(STRATEGIES["bracket"](make_space(learning_rates=rates)), FlatWorld(best_learning_rate=best))
    complete_trials = [outcome for outcome in trials if outcome.is_direct]
    table = build_table(complete_trials, "loss", False, partial_outcomes=trials)
    decision = decide_table(table, 0.01)
    assert (decision.rank, decision.reference_rank, table.list_tried_rates(1)) == (1, 1, [decision.learning_rate])
    assert ("lr_edge" in decision.flags) == is_flagged
    runs = [run for run in decision.next_runs if run.action == "rates"]
    assert [run.learning_rates for run in runs] == ([[pytest.approx(suggested)]] if is_flagged else [])


def test_one_learning_rate_at_each_rank_has_no_edge() -> None:
    values = {(4, 3e-3): 2.05, (16, 1e-3): 2.001, (64, 3e-4): 2.0}
    cells = {(rank, lr, 0): Cell(f"{rank}", v, np.array([v]), np.ones(1)) for (rank, lr), v in values.items()}
    assert "lr_edge" not in decide_table(ScoreTable("loss", False, cells), 0.02).flags


def test_trainings_of_unequal_length_are_flagged() -> None:
    def build_table_with_steps(steps: dict[int, int]) -> ScoreTable:
        cells = {
            (rank, 1e-3, 0): Cell(f"{rank}", 2 + 0.1 / rank, np.array([2 + 0.1 / rank]), np.ones(1), steps=steps[rank])
            for rank in steps
        }
        return ScoreTable("loss", False, cells)

    assert "unequal_length" not in decide_table(build_table_with_steps({4: 400, 16: 400, 64: 400}), 0.005).flags
    decision = decide_table(build_table_with_steps({4: 400, 16: 250, 64: 400}), 0.005)
    assert "unequal_length" in decision.flags
    assert "the trainings have 250 to 400 steps" in decision.sentence
    assert (
        "unequal_length" not in decide_table(build_value_table({1: 3.0, 4: 2.25, 16: 2.06})).flags
    )  # no length is stated


@given(st.sampled_from([1e-4, 3e-4, 1e-3]), st.sampled_from([1e-4, 3e-4, 1e-3]), st.floats(0, 0.004))
def test_the_edge_is_flagged_if_the_answer_or_its_reference_lies_there(small: float, large: float, gain: float) -> None:
    rates = (1e-4, 3e-4, 1e-3)
    values = {
        (rank, rate): 2 - gain * (rank == 16) + 0.1 * (rate != best)
        for rank, best in ((4, small), (16, large))
        for rate in rates
    }
    cells = {(rank, rate, 0): Cell(f"{rank}", v, np.array([v]), np.ones(1)) for (rank, rate), v in values.items()}
    decision = decide_table(ScoreTable("loss", False, cells), 0.005)
    answer = {decision.rank or decision.recommended_rank, decision.reference_rank}
    is_at_edge = any({4: small, 16: large}[rank] != 3e-4 for rank in answer if rank)
    assert ("lr_edge" in decision.flags) == is_at_edge
