"""Run the short forms of benchmarks/decide and benchmarks/compared, and check that stored results meet what is claimed of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks.compared import calibration as compare_calibration
from benchmarks.decide import calibration, published
from benchmarks.decide.printed import SHAPES, Design, judge_design
from benchmarks.decide.simulated import MARGIN, RANKS, World, draw_table, draw_true_losses, find_shown_rank

from rightrank.decision.evidence import Evidence
from rightrank.decision.rule import compare_ranks


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
@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_a_rank_that_is_called_enough_is_seldom_worse_than_the_margin(seeds: int) -> None:
    """Seed noise of twice the margin: what came out best is worse than the margin in one table of ten or more."""
    generator = np.random.default_rng(24)
    shown, best, tables = 0, 0, 40
    for shape in ("power", "u_shaped", "rising"):
        world = World(shape, seeds, 200, "heavy", seed_rank=2 * MARGIN)  # type: ignore[arg-type]
        for _ in range(tables):
            losses = draw_true_losses(world, generator)
            comparison = compare_ranks(Evidence(draw_table(world, losses, generator)), MARGIN)
            shown_rank = find_shown_rank(comparison)
            worse = {rank: bool(loss - losses.min() > MARGIN) for rank, loss in zip(RANKS, losses, strict=True)}
            shown += shown_rank is not None and worse[shown_rank]
            best += worse[comparison.chosen]
    assert shown <= 0.05 * 3 * tables
    assert best >= 0.05 * 3 * tables


TABLES = 24


@pytest.mark.trains
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


def test_a_pair_at_the_margin_is_rarely_called_not_worse() -> None:
    def draw(generator: np.random.Generator) -> tuple[compare_calibration.Floats, compare_calibration.Floats, float]:
        return 0.01 + generator.normal(0, 0.1, 100), np.ones(100), 0.01

    verdicts = compare_calibration.count_verdicts(draw, 0, 600)
    assert verdicts["not_worse"] <= 0.08
    assert verdicts["worse"] <= 0.08
    assert verdicts["cannot_tell"] >= 0.85
