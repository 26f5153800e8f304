"""Check seed noise, pairs of trainings and conflicting metrics against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightrank.decision import table
from rightrank.decision.evidence import measure_seed_variance
from rightrank.decision.rule import decide_table
from rightrank.decision.table import (
    Cell,
    Contender,
    ScoreTable,
    align_contenders,
    build_table,
    pair_cells,
    select_best_learning_rate,
    select_contender,
)
from tests.decision.tables import make_trial
from tests.examples import limit_examples


def make_contender(rank: int, **losses: float) -> Contender:
    """Make cells by seed, named s0, s1, …, with one number each."""
    cells = {int(name[1:]): Cell(f"{rank}{name}", loss, np.array([loss]), np.ones(1)) for name, loss in losses.items()}
    return Contender(rank, 1e-3, cells, float(np.mean(list(losses.values()))))


def test_common_and_individual_seed_noise_are_separated_where_ranks_share_seeds() -> None:
    """Analyze two ways without replication: rows 1, 2, 6 and 3, 5, 7 over three seeds.

    The row means are 3 and 5, the column means 2, 3.5 and 6.5, and the grand mean is 4. The residuals are 0, -.5, .5
    and their opposites. Their squares sum to 1, over (2-1)·(3-1) degrees = .5. The variance of the columns is 5.25.
    """
    variance, degrees = measure_seed_variance(
        [make_contender(1, s0=1, s1=2, s2=6), make_contender(4, s0=3, s1=5, s2=7)]
    )
    common, individual = 5.25 - 0.5 / 2, 0.5
    assert variance == pytest.approx(common + individual)
    assert degrees == pytest.approx(variance**2 / (common**2 / 2 + individual**2 / 2))


def test_common_noise_is_never_negative() -> None:
    noise = measure_seed_variance([make_contender(1, s0=1, s1=2), make_contender(4, s0=2, s1=1)])
    assert noise == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    "other_contenders",
    [[], [make_contender(4, s7=1.0)], [make_contender(4, s0=3, s5=5, s6=7)]],
    ids=["one rank", "one rank of two seeds", "one seed shared"],
)
def test_seed_noise_is_pooled_where_fewer_than_two_seeds_are_shared(other_contenders: list[Contender]) -> None:
    """Pool a sum of squares of 2 over 1 degree at rank 1 with one of 8 over 2 degrees at rank 4, which has three seeds."""
    has_three_seeds = bool(other_contenders) and len(other_contenders[0].cells) == 3
    expected = (10 / 3, 3) if has_three_seeds else (2.0, 1)
    assert measure_seed_variance([make_contender(1, s0=1, s1=3), *other_contenders]) == pytest.approx(expected)


def compute_pair_differences(left_contender: Contender, right_contender: Contender) -> list[tuple[str, float, float]]:
    pairs = pair_cells(left_contender, right_contender)
    sums = table.compute_differences(pairs)[:, 0].tolist()
    return [
        (left_cell.trial_id, left_cell.value - right_cell.value, worse)
        for (left_cell, right_cell), worse in zip(pairs, sums, strict=True)
    ]


def test_pairs_share_a_seed_if_possible() -> None:
    differences = compute_pair_differences(make_contender(1, s0=5, s1=7, s2=9), make_contender(4, s2=1, s0=2, s9=4))
    assert differences == [("1s0", 3, 3), ("1s2", 8, 8)]


def test_the_base_s_one_evaluation_pairs_with_every_seed() -> None:
    base, trained = make_contender(0, s0=5), make_contender(4, s1=1, s2=2)
    assert compute_pair_differences(base, trained) == [("0s0", 4, 4), ("0s0", 3, 3)]
    assert compute_pair_differences(trained, base) == [("4s1", -4, -4), ("4s2", -3, -3)]
    assert compute_pair_differences(make_contender(0, s1=5, s2=6), trained) == [("0s1", 4, 4), ("0s2", 4, 4)]


def test_weights_follow_the_pair() -> None:
    weights = np.array([2.0, 3.0])
    contender = Contender(1, 0.0, {0: Cell("a", 1.0, np.array([2.0, 6.0]), weights)}, 1.0)
    other_contender = Contender(4, 0.0, {0: Cell("b", 0.5, np.array([1.0, 3.0]), weights)}, 0.5)
    pairs = pair_cells(contender, other_contender)
    assert table.compute_differences(pairs).tolist() == [[1.0, 3.0]]
    assert table.estimate_pairs(pairs).mean == pytest.approx(4 / 5)


@pytest.mark.parametrize(("lower", "noise", "is_chosen"), [(0.02, 0.05, True), (0.02, 0.3, False), (0.0, 0.0, False)])
def test_a_learning_rate_with_fewer_seeds_needs_clear_evidence(lower: float, noise: float, is_chosen: bool) -> None:
    """Compare the learning rates on the seed that both have: a lucky seed of one of them is no reason."""
    generator = np.random.default_rng(1)
    num_examples = 100
    first, second = 2.0 + generator.normal(0, 0.5, (2, num_examples))
    noise_values = generator.normal(0, noise, num_examples)
    lucky = first - lower + noise_values - noise_values.mean()
    cells = {
        (4, lr, seed): Cell(f"{lr}-{seed}", float(values.mean()), values, np.ones(num_examples))
        for lr, seed, values in ((1e-3, 0, first), (1e-3, 1, second), (3e-3, 0, lucky))
    }
    contender = select_contender(ScoreTable("eval_loss", False, cells, {}, "token_loss"), 4)
    assert contender.learning_rate == (3e-3 if is_chosen else 1e-3)
    assert set(contender.cells) == ({0} if is_chosen else {0, 1})


def test_a_rank_without_a_seed_is_adjusted_for_its_effect() -> None:
    aligned = align_contenders([make_contender(1, s0=1, s1=2), make_contender(4, s1=2.5)])
    assert [contender.loss for contender in aligned.values()] == pytest.approx([1.5, 2.0], abs=1e-3)


def test_a_learning_rate_that_shares_no_seed_is_not_taken() -> None:
    cells = {(4, lr, seed): Cell(f"{lr}{seed}", loss, np.array([loss]), np.ones(1)) for lr, seed, loss in (
        (1e-3, 0, 2.0), (1e-3, 1, 2.0), (3e-3, 2, 1.0),
    )}  # fmt: skip
    table = ScoreTable("eval_loss", False, cells, {}, "token_loss", {4: {1e-2}, 16: {1e-4}})
    assert select_contender(table, 4).learning_rate == 1e-3
    assert table.list_tried_rates(4) == [1e-3, 3e-3, 1e-2]
    assert table.list_tried_rates(64) == []
    assert table.get_cells_by_rate(64) == {}


@pytest.mark.parametrize(
    ("seeds", "best"),
    [
        ({1e-3: (0, 1), 3e-3: (0, 1)}, 1e-3),  # the lower rate on ties
        ({3e-3: (0, 1), 1e-3: (0, 1)}, 1e-3),
        ({1e-3: (0, 1, 2), 3e-3: (0, 1), 1e-2: (0,)}, 1e-2),  # each replaces the previous one
        ({1e-3: (0, 1, 2), 3e-3: (0,), 1e-4: (0, 1)}, 3e-3),  # more seeds come first
        ({1e-3: (0, 1, 2), 3e-3: (1,), 1e-2: (1,)}, 1e-2),  # then lower rates
        ({1e-3: (0, 1, 2), 3e-3: (1,), 1e-2: (2,)}, 3e-3),  # no common seed, no comparison
        ({1e-3: (0, 1), 3e-3: (5,), 1e-2: (1,)}, 1e-2),
    ],
)
def test_learning_rates_with_fewer_seeds_are_compared_one_after_the_other(
    seeds: dict[float, tuple[int, ...]], best: float
) -> None:
    losses = {rate: dict.fromkeys(of_rate, 2.0) for rate, of_rate in seeds.items()}
    assert select_best_learning_rate(losses, lambda rate, other_rate: True) == best
    assert select_best_learning_rate(losses, lambda rate, other_rate: False) == 1e-3


def test_a_base_with_one_number_is_compared_by_example() -> None:
    """Take the base's number as its score on each example, and not as the sum over all of them."""
    generator = np.random.default_rng(4)
    ease = generator.normal(0, 0.1, 40)
    trials = [
        make_trial(trial_id=f"{rank}", rank=rank, value=float(scores.mean()), example_scores=scores.tolist())
        for rank, level in ((4, 2.0), (16, 1.9))
        for scores in [level + ease + generator.normal(0, 0.01, 40)]
    ]
    decision = decide_table(build_table([make_trial("base", 0, 2.5), *trials], "eval_loss", False), 0.05)
    base, *ranks = decision.ranks
    assert base.difference is not None
    assert base.difference == pytest.approx(2.5 - ranks[1].value)
    assert base.difference_low is not None
    assert 0 < base.difference_low < base.difference
    assert decision.basis == "examples"


def test_trainings_without_example_scores_are_compared_by_their_values() -> None:
    scored = make_trial("4", 4, 2.0, example_scores=[1.0, 3.0])
    table = build_table([scored, make_trial("16", 16, 1.9)], "eval_loss", False)
    assert [(cell.value, cell.examples) for cell in table.cells.values()] == [(2.0, 0), (1.9, 0)]


@limit_examples(60)
@given(st.integers(0, 2**32 - 1), st.sampled_from((1, 40)), st.booleans())
def test_values_differences_and_bounds_are_of_the_same_seeds(number: int, examples: int, has_base: bool) -> None:
    """Draw tables in which ranks and learning rates lack some seeds."""
    generator = np.random.default_rng(number)
    level = 2 + 0.05 * generator.standard_normal(4)
    trials = [
        make_trial(f"{rank}-{rate}-{seed}", rank, float(scores.mean()), learning_rate=rate, seed=seed,
                   example_scores=scores.tolist() if examples > 1 else None)
        for rank in ([0] if has_base else []) + [2, 4, 8]
        for rate in ((1e-3, 3e-3) if rank else (0.0,))
        for seed in (generator.permutation(4)[: generator.integers(1, 5)].tolist() if rank else (0,))
        for scores in [level[seed] + (0.3 if rank == 0 else 0.1 / rank) + 0.02 * generator.standard_normal(examples)]
    ]  # fmt: skip
    decision = decide_table(build_table(trials, "eval_loss", False), 0.01)
    values = {evidence.rank: evidence.value for evidence in decision.ranks}
    reference = values[decision.reference_rank]
    assert reference == min(value for rank, value in values.items() if rank > 0)
    for evidence in decision.ranks:
        assert evidence.low <= evidence.value + 1e-9
        assert evidence.value <= evidence.high + 1e-9
        assert evidence.difference == pytest.approx(evidence.value - reference, abs=1e-9)
        if evidence.difference_low is not None:
            assert evidence.difference_high is not None
            assert evidence.difference_low - 1e-9 <= evidence.difference <= evidence.difference_high + 1e-9
