"""Bounds where rows belong together: of groups and not of their rows, at the nominal rate with few and unequal groups."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from rightrank.decision.comparison import (
    bounds_of,
    bounds_of_files,
    degrees_of_groups,
    estimate,
    estimate_of_files,
)
from rightrank.decision.evidence import Evidence
from rightrank.decision.rule import decision_of
from rightrank.decision.seeds import pair_noise
from rightrank.decision.table import Cell, ScoreTable, groups_of, minus, table_of_results
from rightrank.schema.decision import Result, ResultsTable
from rightrank.schema.trials import Floats, Groups

ROWS = 10


def drawn(seed: int, seeds: int = 2, groups: int = 40) -> Floats:
    return np.random.default_rng(seed).exponential(size=(seeds, groups)) - 0.8


@pytest.mark.parametrize("span", [0.0, 1.0])
@pytest.mark.parametrize("seeds", [1, 3])
def test_rows_that_repeat_their_group_say_no_more_than_one_of_them(seeds: int, span: float) -> None:
    sums = drawn(1, seeds)
    rows, ones = np.repeat(sums, ROWS, axis=1), np.ones(40)
    groups, weights = np.repeat(np.arange(40), ROWS), np.repeat(ones, ROWS)
    alone, grouped = estimate(sums, ones, span), estimate(rows, weights, span, groups)
    for name in ("mean", "examples_variance", "interaction_variance", "examples", "examples_degrees", "skewness"):
        assert getattr(grouped, name) == pytest.approx(getattr(alone, name)), name
    assert bounds_of(grouped).high == pytest.approx(bounds_of(alone).high)
    files = bounds_of_files(rows[0], weights, 0.0, groups)
    assert files.high == pytest.approx(bounds_of_files(sums[0], ones).high)
    assert estimate(rows, weights, span).examples_variance < grouped.examples_variance / 9


def test_groups_of_one_example_are_no_groups() -> None:
    sums, weights = drawn(2), np.arange(1.0, 41.0)
    alone, grouped = estimate(sums, weights), estimate(sums, weights, 0.0, np.arange(40))
    assert grouped.mean == alone.mean
    assert grouped.standard_error == pytest.approx(alone.standard_error, rel=0.05)
    assert groups_of(list(range(40)), 40) is None
    assert groups_of([3] * 40, 40) is None
    assert groups_of([0, 1], 40) is None
    assert groups_of([7, 2, 7, 5], 4).tolist() == [2, 0, 2, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("sizes", [[5.0] * 12, [100.0, 100.0, *[10.0] * 10], [1.0, 2.0, 3.0]])
def test_degrees_are_those_of_the_quadratic_form(sizes: list[float]) -> None:
    weights = np.array(sizes)
    h = weights / weights.sum()
    residual = np.eye(len(h)) - np.outer(h, np.ones(len(h)))
    matrix = np.diag(1 / np.sqrt(1 - h)) @ residual @ np.diag(weights)
    form = matrix @ matrix.T
    assert degrees_of_groups(weights) == pytest.approx(max(1.0, np.trace(form) ** 2 / np.trace(form @ form)))


def world(draw: np.random.Generator, sizes: list[int], likeness: float) -> tuple[Floats, Groups]:
    """Differences whose true mean is 0, with this intraclass correlation."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    shared = draw.standard_normal(len(sizes))[groups]
    return np.sqrt(likeness) * shared + np.sqrt(1 - likeness) * draw.standard_normal(len(groups)), groups


@pytest.mark.parametrize("sizes", [[10] * 40, [4] * 100, [10] * 6, [80, 40, *[5] * 10]])
def test_bounds_of_groups_err_in_five_of_a_hundred_draws(sizes: list[int]) -> None:
    draw, errors, alone = np.random.default_rng(3), 0, 0
    for _ in range(800):
        sums, groups = world(draw, sizes, 0.8)
        ones = np.ones(len(sums))
        errors += bounds_of(estimate(sums[None], ones, 0.0, groups)).high < 0
        errors += bounds_of_files(sums, ones, 0.0, groups).high < 0
        alone += bounds_of(estimate(sums[None], ones)).high < 0
    assert errors / 1600 < 0.065
    assert alone / 800 > 0.12  # rows taken as independent


def table_of_groups(likeness: float) -> ScoreTable:
    draw, cells = np.random.default_rng(5), {}
    for rank in (4, 16):
        sums, groups = world(draw, [10] * 80, likeness)
        for seed in (0, 1):
            noisy = 2 + 0.1 * sums + 0.01 * draw.standard_normal(len(sums))
            cells[rank, 1e-3, seed] = Cell(
                f"{rank} {seed}", float(noisy.mean()), noisy, np.ones(len(sums)), groups=groups
            )
    return ScoreTable("loss", False, cells)


def test_every_bound_and_probability_of_a_decision_follows_the_groups() -> None:
    grouped = table_of_groups(0.9)
    alone = replace(grouped, cells={key: replace(cell, groups=None) for key, cell in grouped.cells.items()})
    wide, narrow = Evidence(grouped), Evidence(alone)
    for rank in (4, 16):
        assert (
            wide.value(wide.contenders[rank]).standard_error > 2 * narrow.value(narrow.contenders[rank]).standard_error
        )
    worse = max((4, 16), key=lambda rank: wide.contenders[rank].loss)
    assert (
        wide.difference(wide.contenders[worse]).standard_error
        > 2 * narrow.difference(narrow.contenders[worse]).standard_error
    )
    assert wide.reference_gap > narrow.reference_gap
    assert abs(wide.probability(worse, 0.0) - 0.5) < abs(narrow.probability(worse, 0.0) - 0.5)  # type: ignore[operator]
    decided, plain = decision_of(grouped, 0.005), decision_of(alone, 0.005)
    assert [one.value for one in decided.ranks] == [one.value for one in plain.ranks]


def test_the_next_run_asks_for_groups() -> None:
    (run,) = [one for one in decision_of(table_of_groups(0.9), 0.003, confidence=None).next_runs if one.items]
    assert re.search(r"(Score|and score) about [\d,]+ groups of held-out examples \(now 80\)", run.sentence)
    needed = int(re.findall(r"about ([\d,]+) groups", run.sentence)[0].replace(",", ""))
    assert run.items == 10 * needed


def test_examples_that_are_alike_count_as_fewer() -> None:
    rows, groups = np.repeat(drawn(4), ROWS, axis=1), np.repeat(np.arange(40), ROWS)
    ones = np.ones(rows.shape[1])
    assert pair_noise(rows, ones, groups).likeness == pytest.approx(ROWS)
    assert pair_noise(rows, ones).likeness == 1.0
    assert estimate_of_files(rows[0], ones, 0.0, groups).degrees <= 39


def test_a_difference_keeps_the_groups_of_its_examples() -> None:
    groups = np.array([0, 0, 1])
    one, other = (Cell(name, 0.0, np.ones(3), np.ones(3), 0.0, groups=groups) for name in ("one", "other"))
    assert minus(one, other).groups is groups


def test_more_examples_of_groups_that_say_the_same_count_as_so_many_groups() -> None:
    draw, alone, repeated = np.random.default_rng(6), {}, {}
    for rank in (4, 16):
        for seed in (0, 1, 2):
            sums, key = 2 + 0.1 * draw.standard_normal(80), (rank, 1e-3, seed)
            alone[key] = Cell(f"{key}", float(sums.mean()), sums, np.ones(80))
            rows, groups = np.repeat(sums, ROWS), np.repeat(np.arange(80), ROWS)
            repeated[key] = Cell(f"{key}", float(sums.mean()), rows, np.ones(len(rows)), groups=groups)
    of_rows, of_groups = (Evidence(ScoreTable("loss", False, cells)) for cells in (alone, repeated))
    for examples in (80, 160, 800):
        margin = of_rows.margins_at(0.95, examples=examples)[4]
        # not quite the same: the noise within a seed is estimated from 800 rows and not from 80
        assert of_groups.margins_at(0.95, examples=ROWS * examples)[4] == pytest.approx(margin, rel=0.01)
    assert margin < 0.9 * of_rows.margins_at(0.95)[4]


def test_a_table_of_results_keeps_the_steps_and_the_groups_of_its_examples() -> None:
    results = [
        Result(trial_id=f"{rank}", rank=rank, value=2.0, steps=7, item_values=[1.0, 3.0, 2.0, 2.0], item_groups=groups)
        for rank, groups in ((4, [5, 5, 1, 1]), (16, None))
    ]
    read = ResultsTable(metric="eval_loss", higher_is_better=False, results=results, understood=[])
    cells = table_of_results(read).cells
    assert cells[4, 0.0, 0].groups.tolist() == [1, 1, 0, 0]  # type: ignore[union-attr]
    assert cells[16, 0.0, 0].groups is None
    assert [cell.steps for cell in cells.values()] == [7, 7]


def test_the_winner_s_curse_of_a_learning_rate_follows_the_groups() -> None:
    draw, cells = np.random.default_rng(8), {}
    for rank, rate in ((4, 1e-3), (4, 2e-3), (16, 1e-3)):
        sums, groups = world(draw, [10] * 80, 0.9)
        cells[rank, rate, 0] = Cell(f"{rank} {rate}", 2.0, 2 + 0.1 * sums, np.ones(len(sums)), groups=groups)
    grouped = ScoreTable("loss", False, cells)
    alone = replace(grouped, cells={key: replace(cell, groups=None) for key, cell in cells.items()})
    wide, narrow = (Evidence(table).contenders for table in (grouped, alone))
    assert wide[4].gap > 1.5 * narrow[4].gap > 0
    assert wide[16].gap == narrow[16].gap == 0
