"""Run the short forms of benchmarks/decide."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks.decide import calibration, printed, published, seed_coverage
from benchmarks.decide.simulated import MARGIN, RANKS, World, draw_table, draw_true_losses

from rightrank.decision.rule import decide_table

pytestmark = pytest.mark.trains


def test_published_curves_are_picked_and_called_rising_as_stored() -> None:
    curves = published.read_curves()
    stored = json.loads((Path(published.__file__).parent / "published.json").read_text())
    ours = published.score_rule(published.RULES["rightrank"], curves)
    assert ours == stored["scores"]["rightrank"]
    assert ours["acceptable"] >= 0.9 * len(curves)
    rising = published.count_rising(curves)
    assert rising == stored["rising"]
    assert rising["said of those"] >= 0.9 * rising["rise"]
    assert rising["said of others"] <= 0.1 * (len(curves) - rising["rise"])
    assert published.judge_grids(curves) == stored["grids"]


def test_the_picks_do_not_depend_on_what_a_curve_is_called() -> None:
    for curve in published.read_curves():
        anonymous = {**curve, "id": "x", "source": "x", "model": "x", "dataset": "x"}
        assert published.decide_curve(anonymous).rank == published.decide_curve(curve).rank


@pytest.mark.parametrize("shape", ["power", "flat", "u_shaped", "rising"])
def test_simulated_tables_are_covered_and_rarely_misjudged(shape: str) -> None:
    """Loose, for 40 tables; benchmarks/decide/calibration.json has the figures."""
    result = calibration.judge_world(World(shape, 3, 200, "heavy"), 40, 1)  # type: ignore[arg-type]
    assert result.covers >= 0.88
    assert result.false <= 0.1
    if result.decided >= 0.25:  # of fewer tables a share says little
        assert result.within_octave >= 0.8


def test_stored_calibration_meets_what_is_claimed_of_it() -> None:
    summary = json.loads((Path(calibration.__file__).parent / "calibration.json").read_text())["summary"]
    assert 0.93 <= summary["covers, two seeds or more"] <= 0.98
    assert summary["covers, quiet seeds"] >= 0.93
    assert summary["false acceptance, mean"] <= 0.05
    assert summary["within an octave, of all decided"] >= 0.95


def test_stored_printed_bounds_meet_what_is_claimed_of_them() -> None:
    groups = json.loads(printed.OUT.read_text(encoding="utf-8"))["summary"]
    for name, by_method in groups.items():
        uncorrected, corrected = by_method["before"], by_method["after"]
        assert 0.945 <= corrected["lower"] <= 0.97, name
        assert corrected["upper"] == uncorrected["upper"] >= 0.98, name
        assert uncorrected["lower"] < corrected["lower"] - 0.015, name
        assert uncorrected["decided"] - 0.03 <= corrected["decided"] <= uncorrected["decided"], name
        assert corrected["false"] <= uncorrected["false"], name
        assert corrected["false_fallback"] <= 0.05, name


def test_stored_coverage_of_a_further_seed_meets_what_is_claimed_of_it() -> None:
    stored = json.loads((Path(seed_coverage.__file__).parent / "seed_coverage.json").read_text())["groups"]
    for group in ("GLUE, one number", "planted, chose nothing"):
        for by_method in (by_method for seeds, by_method in stored[group].items() if seeds != "1"):
            assert 0.90 <= by_method["after"]["share"] <= 0.98
            assert by_method["after"]["median_half_width"] < by_method["own"]["median_half_width"]
        assert stored[group]["1"]["before"]["share"] < 0.6  # what a constant for the seed noise was worth


def test_coverage_of_a_further_seed_is_the_stored_one_on_a_grid() -> None:
    """Use one model and task of GLUE: 210 trainings of 50 to 5,000 examples."""
    grids = {
        name: grid for name, grid in seed_coverage.read_stored_grids().items() if grid["task"] == "roberta-base rte"
    }
    checks = [
        check
        for name, grid in grids.items()
        for check in seed_coverage.iterate_checks(seed_coverage.build_source(name, grid), sizes=(2,))
    ]
    summary = seed_coverage.summarize(checks)["2"]["after"]
    assert len(grids) == 7
    assert 0.85 <= summary["share"] <= 1.0
    assert summary["grids"] == 1
    assert summary["interval"] is None  # one model and task is too few to resample


def test_an_interval_that_ignores_seeds_is_caught() -> None:
    """Test the check itself: with only seed noise, an interval over examples covers almost nothing."""
    generator = np.random.default_rng(1)
    cells = []
    for rank in (4, 16, 64):
        for seed in range(4):
            noise = 0.05 * generator.standard_normal() + 0.001 * generator.standard_normal(200)
            cells.append([rank, 1e-3, seed, (2 + noise).tolist()])
    grid = {"family": "real", "task": "made up", "metric": "loss", "steps": 1, "tokens": [1] * 200, "cells": cells}
    summary = seed_coverage.summarize(list(seed_coverage.iterate_checks(seed_coverage.build_source("made up", grid))))
    assert summary["1"]["after"]["share"] < 0.2
    assert summary["3"]["own"]["share"] > 0.6


@pytest.mark.parametrize(
    "seeds", [1, pytest.param(2, marks=pytest.mark.trains), pytest.param(3, marks=pytest.mark.trains)]
)
def test_a_rank_that_is_called_enough_is_seldom_worse_than_the_margin(seeds: int) -> None:
    """Seed noise of twice the margin: what came out best is worse than the margin in one table of ten or more."""
    generator = np.random.default_rng(24)
    shown, best, tables = 0, 0, 40
    for shape in ("power", "u_shaped", "rising"):
        world = World(shape, seeds, 200, "heavy", seed_rank=2 * MARGIN)  # type: ignore[arg-type]
        for _ in range(tables):
            losses = draw_true_losses(world, generator)
            decision = decide_table(draw_table(world, losses, generator), MARGIN)
            worse = {rank: bool(loss - losses.min() > MARGIN) for rank, loss in zip(RANKS, losses, strict=True)}
            shown += decision.fallback_rank is not None and worse[decision.fallback_rank]
            best += worse[decision.best_available_rank]
    assert shown <= 0.05 * 3 * tables
    assert best >= 0.05 * 3 * tables
