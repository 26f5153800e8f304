"""Test the replay of finished grids: its contract, its counts, and the strategies' results on the published grids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.selection.replay import judge, replay_all, summarize
from benchmarks.selection.tables import read_grids

from rightrank.search.strategies import STRATEGIES

pytestmark = pytest.mark.trains

PUBLISHED = Path(__file__).parents[2] / "benchmarks/selection/published_grids.json"
GRID = {
    "id": "made up",
    "ranks": [1, 2, 4],
    "higher_is_better": False,
    "lr_grid": {
        "1": {"0.001": 1.30, "0.003": 1.20},
        "2": {"0.001": 1.06, "0.003": 1.10},
        "4": {"0.001": 1.05, "0.003": 1.00},
    },
}


def write(path: Path, *curves: object) -> Path:
    path.write_text(json.dumps({"curves": curves}))
    return path


@pytest.mark.parametrize("strategy", ["bracket"])
@pytest.mark.parametrize("margin", [0.002, 0.005])
def test_published_grids_meet_the_goal(strategy: str, margin: float) -> None:
    summary = summarize(replay_all(read_grids(PUBLISHED), STRATEGIES[strategy], margin))
    assert summary["exact_or_neighbour"] >= 0.95 * summary["curves"]
    assert summary["under_picks"] <= 0.02 * summary["curves"]
    assert summary["share_of_cells"] <= 0.55  # these trainings cannot stop early


def test_the_whole_grid_is_always_exact() -> None:
    summary = summarize(replay_all(read_grids(PUBLISHED), STRATEGIES["grid"], 0.005))
    assert summary["exact"] == summary["curves"] == 16
    assert summary["share_of_cells"] == 1


def test_counts_under_and_over(tmp_path: Path) -> None:
    curve = read_grids(write(tmp_path / "grids.json", GRID))[0]
    assert [curve.truth(margin) for margin in (0.01, 0.07, 0.3)] == [4, 2, 1]
    under = judge(curve, 0.01, 1, 0.003, 2.0)
    assert under.under
    assert not under.neighbour
    assert under.regret == pytest.approx(0.19)
    assert judge(curve, 0.07, 4, 0.003, 2.0).over
    handed_over = judge(curve, 0.01, 4, 0.001, 2.0)
    assert handed_over.exact
    assert handed_over.regret == pytest.approx(0.04)  # of the cell, not of the rank at its best
    assert judge(curve, 0.01, 2, 0.001, 3.0).share == pytest.approx(0.5)
    assert summarize([judge(curve, 0.01, None, None, 1.0)])["abstentions"] == 1
