"""The short forms of benchmarks/decide."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks.decide import calibration, printed, published, seed_coverage
from benchmarks.decide.simulated import MARGIN, RANKS, World, draw_table, truth

from rightrank.decision.rule import decision_of

pytestmark = pytest.mark.trains


def test_published_curves_are_picked_and_called_rising_as_stored() -> None:
    curves = published.curves()
    stored = json.loads((Path(published.__file__).parent / "published.json").read_text())
    ours = published.score(published.RULES["rightrank"], curves)
    assert ours == stored["scores"]["rightrank"]
    assert ours["acceptable"] >= 0.9 * len(curves)
    rising = published.rising(curves)
    assert rising == stored["rising"]
    assert rising["said of those"] >= 0.9 * rising["rise"]
    assert rising["said of others"] <= 0.1 * (len(curves) - rising["rise"])
    assert published.grids(curves) == stored["grids"]


def test_the_picks_do_not_depend_on_what_a_curve_is_called() -> None:
    for curve in published.curves():
        anonymous = {**curve, "id": "x", "source": "x", "model": "x", "dataset": "x"}
        assert published.ours(anonymous).rank == published.ours(curve).rank


@pytest.mark.parametrize("shape", ["power", "flat", "u_shaped", "rising"])
def test_simulated_tables_are_covered_and_rarely_misjudged(shape: str) -> None:
    """Loose, for 40 tables; benchmarks/decide/calibration.json has the figures."""
    found = calibration.study(World(shape, 3, 200, "heavy"), 40, 1)  # type: ignore[arg-type]
    assert found.covers >= 0.88
    assert found.false <= 0.1
    if found.decided >= 0.25:  # of fewer tables a share says little
        assert found.within_octave >= 0.8


def test_stored_calibration_meets_what_is_claimed_of_it() -> None:
    summary = json.loads((Path(calibration.__file__).parent / "calibration.json").read_text())["summary"]
    assert 0.93 <= summary["covers, two seeds or more"] <= 0.98
    assert summary["covers, quiet seeds"] >= 0.93
    assert summary["false acceptance, mean"] <= 0.05
    assert summary["within an octave, of all decided"] >= 0.95


def test_stored_printed_bounds_meet_what_is_claimed_of_them() -> None:
    groups = json.loads(printed.OUT.read_text(encoding="utf-8"))["summary"]
    for name, by_method in groups.items():
        before, after = by_method["before"], by_method["after"]
        assert 0.945 <= after["lower"] <= 0.97, name
        assert after["upper"] == before["upper"] >= 0.98, name
        assert before["lower"] < after["lower"] - 0.015, name
        assert before["decided"] - 0.03 <= after["decided"] <= before["decided"], name
        assert after["false"] <= before["false"], name
        assert after["false_fallback"] <= 0.05, name


def test_stored_coverage_of_a_further_seed_meets_what_is_claimed_of_it() -> None:
    stored = json.loads((Path(seed_coverage.__file__).parent / "seed_coverage.json").read_text())["groups"]
    for group in ("GLUE, one number", "planted, chose nothing"):
        for by_method in (by_method for seeds, by_method in stored[group].items() if seeds != "1"):
            assert 0.90 <= by_method["after"]["share"] <= 0.98
            assert by_method["after"]["median_half_width"] < by_method["own"]["median_half_width"]
        assert stored[group]["1"]["before"]["share"] < 0.6  # what a constant for the seed noise was worth


def test_coverage_of_a_further_seed_is_the_stored_one_on_a_grid() -> None:
    """One model and task of GLUE: 210 trainings of 50 to 5,000 examples."""
    grids = {name: grid for name, grid in seed_coverage.stored_grids().items() if grid["task"] == "roberta-base rte"}
    checks = [
        check
        for name, grid in grids.items()
        for check in seed_coverage.checks(seed_coverage.source_of(name, grid), sizes=(2,))
    ]
    found = seed_coverage.summary(checks)["2"]["after"]
    assert len(grids) == 7
    assert 0.85 <= found["share"] <= 1.0
    assert found["grids"] == 1
    assert found["interval"] is None  # one model and task is too few to resample


def test_an_interval_that_ignores_seeds_is_caught() -> None:
    """The check itself: with seed noise alone, an interval over examples holds almost nothing."""
    generator = np.random.default_rng(1)
    cells = []
    for rank in (4, 16, 64):
        for seed in range(4):
            noise = 0.05 * generator.standard_normal() + 0.001 * generator.standard_normal(200)
            cells.append([rank, 1e-3, seed, (2 + noise).tolist()])
    grid = {"family": "real", "task": "made up", "metric": "loss", "steps": 1, "tokens": [1] * 200, "cells": cells}
    found = seed_coverage.summary(list(seed_coverage.checks(seed_coverage.source_of("made up", grid))))
    assert found["1"]["after"]["share"] < 0.2
    assert found["3"]["own"]["share"] > 0.6


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
            losses = truth(world, generator)
            decision = decision_of(draw_table(world, losses, generator), MARGIN)
            worse = {rank: bool(loss - losses.min() > MARGIN) for rank, loss in zip(RANKS, losses, strict=True)}
            shown += decision.fallback_rank is not None and worse[decision.fallback_rank]
            best += worse[decision.rank_at_hand]
    assert shown <= 0.05 * 3 * tables
    assert best >= 0.05 * 3 * tables
