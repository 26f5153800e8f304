"""Test that bounds follow groups of rows, and cover at the nominal rate with few and unequal groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rightrank.decision.comparison import (
    compute_bounds,
    compute_file_bounds,
    compute_group_degrees,
    estimate_file_difference,
    estimate_mean,
)
from rightrank.decision.evidence import Evidence
from rightrank.decision.rule import decide_table
from rightrank.decision.seeds import measure_pair_noise
from rightrank.decision.table import (
    Cell,
    ScoreTable,
    build_table,
    compute_paired_difference,
    number_groups,
)
from rightrank.schema.trials import Floats, Groups
from tests.decision.tables import make_trial

ROWS = 10


def draw_differences(seed: int, seeds: int = 2, groups: int = 40) -> Floats:
    return np.random.default_rng(seed).exponential(size=(seeds, groups)) - 0.8


@pytest.mark.parametrize("span", [0.0, 1.0])
@pytest.mark.parametrize("seeds", [1, 3])
def test_repeated_rows_of_a_group_add_no_information(seeds: int, span: float) -> None:
    sums = draw_differences(1, seeds)
    rows, unit_weights = np.repeat(sums, ROWS, axis=1), np.ones(40)
    groups, weights = np.repeat(np.arange(40), ROWS), np.repeat(unit_weights, ROWS)
    alone, grouped = estimate_mean(sums, unit_weights, span), estimate_mean(rows, weights, span, groups)
    for name in ("mean", "examples_variance", "interaction_variance", "examples", "examples_degrees", "skewness"):
        assert getattr(grouped, name) == pytest.approx(getattr(alone, name)), name
    assert compute_bounds(grouped).high == pytest.approx(compute_bounds(alone).high)
    files = compute_file_bounds(rows[0], weights, 0.0, groups)
    assert files.high == pytest.approx(compute_file_bounds(sums[0], unit_weights).high)
    assert estimate_mean(rows, weights, span).examples_variance < grouped.examples_variance / 9


def test_groups_of_one_example_are_ignored() -> None:
    sums, weights = draw_differences(2), np.arange(1.0, 41.0)
    alone, grouped = estimate_mean(sums, weights), estimate_mean(sums, weights, 0.0, np.arange(40))
    assert grouped.mean == alone.mean
    assert grouped.standard_error == pytest.approx(alone.standard_error, rel=0.05)
    assert number_groups(list(range(40)), 40) is None
    assert number_groups([3] * 40, 40) is None
    assert number_groups([0, 1], 40) is None
    assert number_groups([7, 2, 7, 5], 4).tolist() == [2, 0, 2, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("sizes", [[5.0] * 12, [100.0, 100.0, *[10.0] * 10], [1.0, 2.0, 3.0]])
def test_degrees_are_those_of_the_quadratic_form(sizes: list[float]) -> None:
    weights = np.array(sizes)
    h = weights / weights.sum()
    residual = np.eye(len(h)) - np.outer(h, np.ones(len(h)))
    matrix = np.diag(1 / np.sqrt(1 - h)) @ residual @ np.diag(weights)
    form = matrix @ matrix.T
    assert compute_group_degrees(weights) == pytest.approx(max(1.0, np.trace(form) ** 2 / np.trace(form @ form)))


def draw_grouped_differences(draw: np.random.Generator, sizes: list[int], likeness: float) -> tuple[Floats, Groups]:
    """Draw differences with a true mean of 0 and this intraclass correlation."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    shared = draw.standard_normal(len(sizes))[groups]
    return np.sqrt(likeness) * shared + np.sqrt(1 - likeness) * draw.standard_normal(len(groups)), groups


@pytest.mark.parametrize("sizes", [[10] * 40, [4] * 100, [10] * 6, [80, 40, *[5] * 10]])
def test_bounds_of_groups_err_in_five_of_a_hundred_draws(sizes: list[int]) -> None:
    draw, errors, alone = np.random.default_rng(3), 0, 0
    for _ in range(800):
        sums, groups = draw_grouped_differences(draw, sizes, 0.8)
        weights = np.ones(len(sums))
        errors += compute_bounds(estimate_mean(sums[None], weights, 0.0, groups)).high < 0
        errors += compute_file_bounds(sums, weights, 0.0, groups).high < 0
        alone += compute_bounds(estimate_mean(sums[None], weights)).high < 0
    assert errors / 1600 < 0.065
    assert alone / 800 > 0.12  # if rows are treated as independent


def build_grouped_table(likeness: float) -> ScoreTable:
    draw, cells = np.random.default_rng(5), {}
    for rank in (4, 16):
        sums, groups = draw_grouped_differences(draw, [10] * 80, likeness)
        for seed in (0, 1):
            noisy = 2 + 0.1 * sums + 0.01 * draw.standard_normal(len(sums))
            cells[rank, 1e-3, seed] = Cell(
                f"{rank} {seed}", float(noisy.mean()), noisy, np.ones(len(sums)), groups=groups
            )
    return ScoreTable("loss", False, cells)


def test_every_bound_and_probability_of_a_decision_follows_the_groups() -> None:
    grouped = build_grouped_table(0.9)
    alone = replace(grouped, cells={key: replace(cell, groups=None) for key, cell in grouped.cells.items()})
    grouped_evidence, ungrouped_evidence = Evidence(grouped), Evidence(alone)
    for rank in (4, 16):
        assert (
            grouped_evidence.estimate_value(grouped_evidence.contenders[rank]).standard_error
            > 2 * ungrouped_evidence.estimate_value(ungrouped_evidence.contenders[rank]).standard_error
        )
    worse = max((4, 16), key=lambda rank: grouped_evidence.contenders[rank].loss)
    assert (
        grouped_evidence.estimate_difference(grouped_evidence.contenders[worse]).standard_error
        > 2 * ungrouped_evidence.estimate_difference(ungrouped_evidence.contenders[worse]).standard_error
    )
    assert grouped_evidence.selection_bias > ungrouped_evidence.selection_bias
    assert abs(grouped_evidence.compute_probability(worse, 0.0) - 0.5) < abs(
        ungrouped_evidence.compute_probability(worse, 0.0) - 0.5
    )  # type: ignore[operator]
    decided, plain = decide_table(grouped, 0.005), decide_table(alone, 0.005)
    assert [evidence.value for evidence in decided.ranks] == [evidence.value for evidence in plain.ranks]


def test_correlated_examples_count_as_fewer() -> None:
    rows, groups = np.repeat(draw_differences(4), ROWS, axis=1), np.repeat(np.arange(40), ROWS)
    weights = np.ones(rows.shape[1])
    assert measure_pair_noise(rows, weights, groups).design_effect == pytest.approx(ROWS)
    assert measure_pair_noise(rows, weights).design_effect == 1.0
    assert estimate_file_difference(rows[0], weights, 0.0, groups).degrees <= 39


def test_a_difference_keeps_the_groups_of_its_examples() -> None:
    groups = np.array([0, 0, 1])
    cell, other_cell = (Cell(name, 0.0, np.ones(3), np.ones(3), 0.0, groups=groups) for name in ("one", "other"))
    assert compute_paired_difference(cell, other_cell).groups is groups


def test_identical_examples_count_as_their_number_of_groups() -> None:
    draw, alone, repeated = np.random.default_rng(6), {}, {}
    for rank in (4, 16):
        for seed in (0, 1, 2):
            sums, key = 2 + 0.1 * draw.standard_normal(80), (rank, 1e-3, seed)
            alone[key] = Cell(f"{key}", float(sums.mean()), sums, np.ones(80))
            rows, groups = np.repeat(sums, ROWS), np.repeat(np.arange(80), ROWS)
            repeated[key] = Cell(f"{key}", float(sums.mean()), rows, np.ones(len(rows)), groups=groups)
    of_rows, of_groups = (Evidence(ScoreTable("loss", False, cells)) for cells in (alone, repeated))
    for examples in (80, 160, 800):
        margin = of_rows.compute_margins(0.95, examples=examples)[4]
        # The values differ slightly, since the noise within a seed is estimated from 800 rows instead of 80.
        assert of_groups.compute_margins(0.95, examples=ROWS * examples)[4] == pytest.approx(margin, rel=0.01)
    assert margin < 0.9 * of_rows.compute_margins(0.95)[4]


def test_a_table_of_results_keeps_the_steps_and_the_groups_of_its_examples() -> None:
    results = [
        make_trial(
            trial_id=f"{rank}",
            rank=rank,
            value=2.0,
            steps=7,
            example_scores=[1.0, 3.0, 2.0, 2.0],
            example_groups=groups,
        )
        for rank, groups in ((4, [5, 5, 1, 1]), (16, None))
    ]
    cells = build_table(results, "eval_loss", False).cells
    assert cells[4, 0.0, 0].groups.tolist() == [1, 1, 0, 0]  # type: ignore[union-attr]
    assert cells[16, 0.0, 0].groups is None
    assert [cell.steps for cell in cells.values()] == [7, 7]
