"""Check that a training far from the other seeds of its rank and learning rate changes no more than its removal would."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightrank.decision.rule import decide_table
from rightrank.decision.table import build_table, find_outliers
from rightrank.schema.results import Decision
from rightrank.schema.trials import TrialOutcome
from tests.decision.tables import make_trial
from tests.examples import limit_examples

Key = tuple[int, float, int]


@dataclass(frozen=True)
class DrawnTable:
    """The scores of a table by rank, learning rate and seed, and one training with its distance from what it would be."""

    scores: dict[Key, np.ndarray]
    far: Key
    distance: float


@st.composite
def draw_tables(draw: st.DrawFn) -> DrawnTable:
    """Draw curves over ranks and learning rates, noise over seeds, and one training that is far above or below."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ranks = (2, 4, 8, 16)[: draw(st.integers(2, 4))]
    rates = (1e-3, 2e-3, 4e-3)[: draw(st.integers(1, 3))]
    seeds, examples = draw(st.integers(2, 4)), draw(st.sampled_from((1, 1, 80)))
    noise, ease = draw(st.sampled_from((2e-4, 2e-3))), 0.3 * generator.standard_normal(examples) * (examples > 1)
    scores = {
        (rank, rate, seed): 2 + generator.uniform(0.01, 0.1) / rank + abs(generator.normal(0, 0.02)) * index
        + noise * generator.standard_normal() + ease + 10 * noise * generator.standard_normal(examples) * (examples > 1)
        for rank in ranks
        for index, rate in enumerate(rates)
        for seed in range(seeds)
    }  # fmt: skip
    return DrawnTable(scores, draw(st.sampled_from(sorted(scores))), draw(st.sampled_from((-1.5, 1.0, 7.7, 300.0))))


def decide_scores(scores: dict[Key, np.ndarray]) -> Decision:
    trials: list[TrialOutcome] = [
        make_trial(
            trial_id=f"{key}",
            rank=key[0],
            learning_rate=key[1],
            seed=key[2],
            value=float(values.mean()),
            example_scores=values.tolist() if len(values) > 1 else None,
        )
        for key, values in scores.items()
    ]
    return decide_table(build_table(trials, "eval_loss", False), 0.005)


def list_differences(decision: Decision) -> dict[int, float | None]:
    return {evidence.rank: evidence.difference for evidence in decision.ranks}


@limit_examples(60)
@given(draw_tables())
def test_a_far_training_counts_as_one_without_a_result(table: DrawnTable) -> None:
    scores = {key: values + table.distance * (key == table.far) for key, values in table.scores.items()}
    decision = decide_scores(scores)
    without = decide_scores({key: values for key, values in scores.items() if key != table.far})
    assert list_differences(decision) == pytest.approx(list_differences(without))
    assert decision.ranks == without.ranks
    assert (decision.rank, decision.verdict) == (without.rank, without.verdict)
    usual = decide_scores(table.scores)
    if table.far[0] not in (decision.reference_rank, usual.reference_rank):
        assert decision.reference_rank == usual.reference_rank
        for rank, difference in list_differences(usual).items():
            assert rank == table.far[0] or list_differences(decision)[rank] == pytest.approx(difference, abs=1e-9)


def test_of_two_seeds_the_one_that_is_far_from_all_others_is_left_out() -> None:
    scores = {(rank, 1e-3, seed): np.array([2 + 0.2 / rank + 0.001 * seed]) for rank in (2, 4, 8) for seed in (0, 1)}
    scores[8, 1e-3, 1] = np.array([9.5])
    decision = decide_scores(scores)
    assert (decision.rank, "outlier" in decision.flags, "one_seed" in decision.flags) == (8, True, True)
    assert decision.sentence.endswith(
        "Seed 1 of rank 8 ended at 9.5, far from its other seeds (2.025), and is left out."
    )


@pytest.mark.parametrize(
    ("by_rank", "far"),
    [
        ({4: (2.0, 2.01, 2.6), 8: (2.0, 2.01, 1.99)}, [(4, 2)]),
        ({4: (2.0, 2.01, 2.15), 8: (2.0, 2.01, 1.99)}, []),  # less than a tenth of the loss
        ({4: (2.0, 2.01, 2.6), 8: (2.0, 2.05, 1.95)}, []),  # seeds differ by a quarter of that anyway
        ({4: (2.0, 2.6), 8: (2.0, 2.01)}, [(4, 1)]),
        ({4: (2.0, 2.6), 8: (2.6, 2.61)}, [(4, 0)]),
        ({4: (2.0, 9.5, 8.0), 8: (2.0, 2.01, 1.99)}, []),  # half of the seeds or more: the learning rate is unstable
        ({4: (2.0, 2.6), 8: (2.0,)}, []),  # nothing to compare with
    ],
)  # fmt: skip
def test_far_is_measured_by_the_loss_and_by_the_other_seeds(
    by_rank: dict[int, tuple[float, ...]], far: list[tuple[int, int]]
) -> None:
    trials = [
        make_trial(f"{rank}-{seed}", rank, value, seed=seed)
        for rank, values in by_rank.items()
        for seed, value in enumerate(values)
    ]
    assert [(outlier.rank, outlier.seed) for outlier in find_outliers(build_table(trials, "eval_loss", False))] == far
