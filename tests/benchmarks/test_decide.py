"""Run the short forms of benchmarks/decide and benchmarks/compared, and check that stored results meet what is claimed of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks.compared import calibration as compare_calibration
from benchmarks.compared import zeros_and_ones
from benchmarks.decide import calibration, printed, published, seed_coverage
from benchmarks.decide.printed import SHAPES, Design, judge_design
from benchmarks.decide.simulated import MARGIN, RANKS, World, draw_table, draw_true_losses

from rightrank.decision.evidence import MAX_EQUAL_ERRORS, Evidence, compute_covariance_to_best
from rightrank.decision.rule import decide_table
from rightrank.decision.seeds import estimate_selection_bias
from tests.decision.tables import build_example_table, build_value_table


@pytest.mark.trains
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


@pytest.mark.trains
@pytest.mark.parametrize("shape", ["power", "flat", "u_shaped", "rising"])
def test_simulated_tables_are_covered_and_rarely_misjudged(shape: str) -> None:
    """Loose, for 40 tables; benchmarks/decide/calibration.json has the figures."""
    result = calibration.judge_world(World(shape, 3, 200, "heavy"), 40, 1)  # type: ignore[arg-type]
    assert result.covers >= 0.88
    assert result.fallback_false <= 0.1


@pytest.mark.trains
def test_stored_calibration_meets_what_is_claimed_of_it() -> None:
    summary = json.loads((Path(calibration.__file__).parent / "calibration.json").read_text())["summary"]
    assert 0.93 <= summary["covers, two seeds or more"] <= 0.98
    assert summary["covers, quiet seeds"] >= 0.93
    assert summary["false fallback, worst world"] <= 0.05


@pytest.mark.trains
def test_stored_printed_bounds_meet_what_is_claimed_of_them() -> None:
    groups = json.loads(printed.OUT.read_text(encoding="utf-8"))["summary"]
    for name, by_method in groups.items():
        uncorrected, corrected = by_method["plain"], by_method["corrected"]
        assert 0.944 <= corrected["lower"] <= 0.97, name
        assert corrected["upper"] == uncorrected["upper"] >= 0.98, name
        assert uncorrected["lower"] < corrected["lower"] - 0.015, name
        assert corrected["false_fallback"] <= 0.05, name


@pytest.mark.trains
def test_stored_coverage_of_a_further_seed_meets_what_is_claimed_of_it() -> None:
    stored = json.loads((Path(seed_coverage.__file__).parent / "seed_coverage.json").read_text())["groups"]
    for group in ("GLUE, one number", "planted, chose nothing"):
        for by_method in (by_method for seeds, by_method in stored[group].items() if seeds != "1"):
            assert 0.90 <= by_method["after"]["share"] <= 0.98
            assert by_method["after"]["median_half_width"] < by_method["own"]["median_half_width"]
        assert stored[group]["1"]["before"]["share"] < 0.6  # what a constant for the seed noise was worth


@pytest.mark.trains
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


@pytest.mark.trains
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


@pytest.mark.trains
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


TABLES = 24


def test_printed_bounds_hold_after_a_search_at_every_noise_of_seeds() -> None:
    """Run benchmarks/decide/printed.py in a short form: three learning rates for each rank, seed noise of up to four margins."""
    results = [
        judge_design(Design(shape, 3, noise, 3, rare=noise == 1.0), TABLES, 100 * number + int(4 * noise))
        for noise in (0.25, 1.0, 4.0)
        for number, shape in enumerate(SHAPES)
    ]
    lower, upper = (
        {
            method: float(np.mean([getattr(shares[method], name) for shares in results]))
            for method in ("plain", "corrected")
        }
        for name in ("lower", "upper")
    )
    assert lower["corrected"] >= 0.94
    assert lower["plain"] <= lower["corrected"] - 0.02
    assert upper["corrected"] >= 0.96


def test_ranks_that_cannot_be_told_from_the_best_are_taken_to_be_as_good() -> None:
    """Check that the selection bias is at least the bias at the observed means, and zero if the best rank is clear."""
    three = Evidence(build_value_table({4: 2.1, 16: 2.05, 64: 2.0}, std=0.05))
    means = np.array([three.contenders[rank].loss for rank in sorted(three.contenders)])
    covariance = compute_covariance_to_best([0.0, 2 * 0.05**2, 2 * 0.05**2])
    assert three.selection_bias > 1.3 * estimate_selection_bias(means[::-1], covariance)
    assert three.selection_bias == pytest.approx(estimate_selection_bias(np.zeros(3), covariance))
    clear = Evidence(build_example_table({1: 2.3, 4: 2.2, 16: 2.1, 64: 2.0}))
    assert clear.selection_bias < 1e-4
    distinct, indistinguishable = (
        Evidence(build_value_table({4: 2.1, 16: 2.0}, std=0.1 / (MAX_EQUAL_ERRORS * far * 2**0.5)))
        for far in (1.01, 0.99)
    )
    assert indistinguishable.selection_bias > 2 * distinct.selection_bias


def test_the_noise_of_few_seeds_is_a_t_and_its_gap_larger() -> None:
    means, covariance = np.zeros(3), np.eye(3)
    assert estimate_selection_bias(means, covariance, 2.0) > 1.2 * estimate_selection_bias(means, covariance, 200.0)
    assert estimate_selection_bias(means, covariance) < 1.05 * estimate_selection_bias(means, covariance, 200.0)


def test_the_stored_error_is_at_most_five_percent() -> None:
    stored = json.loads(compare_calibration.OUT.read_text(encoding="utf-8"))
    assert stored["summary"] == compare_calibration.summarize(stored["cases"])
    assert stored["summary"]["simulated"]["false_not_worse"] <= 0.05
    assert stored["summary"]["real"]["false_not_worse"] <= 0.05


def test_a_pair_at_the_margin_is_rarely_called_not_worse() -> None:
    def draw(generator: np.random.Generator) -> tuple[compare_calibration.Floats, compare_calibration.Floats, float]:
        return 0.01 + generator.normal(0, 0.1, 100), np.ones(100), 0.01

    verdicts = compare_calibration.count_verdicts(draw, 0, 600)
    assert verdicts["not_worse"] <= 0.08
    assert verdicts["worse"] <= 0.08
    assert verdicts["cannot_tell"] >= 0.85


def test_the_stored_error_of_zeros_and_ones_is_at_most_five_percent() -> None:
    summary = json.loads(zeros_and_ones.OUT.read_text(encoding="utf-8"))["summary"]
    assert summary["score test"]["false_not_worse"] <= 0.05
    assert summary["score test"]["false_not_worse_highest"] <= 0.07
    stored = zeros_and_ones.compute_error_rates("score test", 36, 0.1, 0.0)
    assert max(stored) <= 0.07
