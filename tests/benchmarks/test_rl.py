"""Replays of the profile `rl`, in short: on the stored live case, and on a made-up grid in the public grid's format."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from benchmarks.rl import simulated
from benchmarks.rl.replay import MODEL, RESULTS, common_rates, early_leader, live_grid, public_grid, replay, study

from rightrank.decision.table import collapse_of


def test_the_stored_case_is_decided_as_stored() -> None:
    grid = live_grid()
    assert len(grid) == 27
    stored = json.loads(RESULTS.read_text())["live"]["all learning rates"]
    found = replay(grid, common_rates(grid), (0, 1, 2))
    assert found.decision is not None
    assert found.handed_over is not None
    assert (found.decision.rank, found.decision.verdict, found.trainings) == (
        stored["rank"], stored["verdict"], stored["trainings"]
    )  # fmt: skip
    assert collapse_of(found.handed_over.points, 0.05) is None


def test_stored_replays_never_hand_over_a_run_that_collapsed() -> None:
    for name, stored in json.loads(RESULTS.read_text()).items():
        assert stored["subsets"]["handed over a run that collapsed"] == 0, name
        assert stored["all learning rates"]["trainings"] < stored["subsets"]["runs"]


def test_on_the_public_grid_the_answer_is_rank_1() -> None:
    stored = json.loads(RESULTS.read_text())["public"]
    assert (stored["margin"], stored["all learning rates"]["rank"]) == (0.02, 1)
    assert stored["subsets"]["runs that collapsed"] == 8


def test_a_rank_that_is_far_worse_is_seldom_taken() -> None:
    found = simulated.study(gap=0.1, noise=0.005, seeds=2, draws=3)
    assert set(found["ranks"]) <= {"4", "16"}
    stored = json.loads(simulated.RESULTS.read_text())["worlds"]
    assert all(world["ranks"].get("1", 0) <= 1 for world in stored if world["gap"] == 0.1)


def test_a_grid_whose_fast_runs_collapse(tmp_path: Path) -> None:
    """At 3e-4 every run leads at a fifth of the steps and ends at 0; at 1e-4 all ranks end alike."""
    path = write_grid(tmp_path / "grid.db")
    grid = public_grid(path)
    assert len(grid) == 6
    found = replay(grid, (1e-4, 3e-4), (42,))
    assert found.decision is not None
    assert found.handed_over is not None
    assert (found.decision.rank, found.trainings, found.collapsed) == (1, 4, 2)
    assert found.handed_over.end == 0.8
    assert early_leader(grid, (1e-4, 3e-4), 42).end == 0.0
    summary = study(grid, (2,))
    assert summary["runs that collapsed"] == 3
    assert summary["handed over a run that collapsed"] == 0
    assert summary["the early leader"]["handed over a run that collapsed"] == 1


def write_grid(path: Path) -> Path:
    with sqlite3.connect(path) as file:
        file.execute("create table runs (id text, lora_rank integer, lr real, seed integer, model_id text)")
        file.execute("create table run_history (run_id text, step integer, eval_accuracy real)")
        for rank in (1, 16, 256):
            for lr, values in ((1e-4, (0.2, 0.3, 0.6, 0.8)), (3e-4, (0.2, 0.7, 0.4, 0.0))):
                file.execute("insert into runs values (?, ?, ?, 42, ?)", (f"{rank} {lr}", rank, lr, MODEL))
                rows = [(f"{rank} {lr}", step, value) for step, value in zip((0, 10, 30, 50), values, strict=True)]
                file.executemany("insert into run_history values (?, ?, ?)", rows)
        file.execute("insert into runs values ('another', 1, 1e-4, 42, 'another model')")
    return path
