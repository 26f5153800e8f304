"""Test that bounds follow groups of rows, and cover at the nominal rate with few and unequal groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rightrank.decision.comparison import (
    compute_bounds,
    compute_file_bounds,
    compute_group_degrees,
    estimate_mean,
)
from rightrank.decision.evidence import Evidence
from rightrank.decision.rule import decide_table
from rightrank.decision.table import (
    Cell,
    ScoreTable,
)
from rightrank.schema.trials import Floats, Groups

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
