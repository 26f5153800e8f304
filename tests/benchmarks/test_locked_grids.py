"""The locked grids are as they were when they were locked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.selection import compare, judge_locked, locks, one_seed


def test_every_locked_file_has_its_hash() -> None:
    files = {file.name for file in locks.LOCKED.glob("*.json")} - {locks.LOCK.name}
    assert files == set(locks.read_lock())
    for name, entry in locks.read_lock().items():
        assert locks.digest(locks.LOCKED / name) == entry["sha256"], f"{name} was touched after its lock"


def test_no_table_reads_a_locked_grid() -> None:
    patterns = {*one_seed.FILES, *(pattern for files, _, _ in compare.FAMILIES.values() for pattern in files.split())}
    files = {path for pattern in patterns for path in compare.HERE.glob(pattern)}
    assert {path.parent.name for path in files} == {"selection", "grids"}
    assert not {path.name for path in files} & set(locks.read_lock())


def test_an_interval_over_grids_holds_the_mean_and_is_exact_where_all_agree() -> None:
    low, high = compare.share_interval(np.array([0.0, 1.0, 0.5, 1.0]), np.array([3.0, 3.0, 6.0, 3.0]))
    assert low < 0.6 < high
    assert compare.share_interval(np.ones(16), np.ones(16)) == [0.794, 1.0]
    assert compare.share_interval(np.zeros(16), np.ones(16)) == [0.0, 0.206]


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(locks, "LOCKED", tmp_path / "locked")
    monkeypatch.setattr(locks, "LOCK", tmp_path / "locked" / "lock.json")
    return tmp_path / "locked"


def test_the_picture_has_locked_grids_only_after_their_judgement(
    tmp_path: Path, locked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_locked, "JUDGED", tmp_path / "judged.json")
    shutil.copy(compare.HERE / "grids" / "newsgroups.json", locked / "secret.json")
    opened = [curve.name for curve in compare.whole_grids_of("real, 400 steps")]
    assert judge_locked.draw(tmp_path / "grids.svg") == opened
    assert "locked" not in (tmp_path / "grids.svg").read_text()
    judge_locked.JUDGED.write_text(json.dumps({"grids": ["secret"]}))
    assert judge_locked.draw(tmp_path / "grids.svg") == [*opened, "newsgroups_400_steps"]
    assert "newsgroups_400_steps, locked: rank 64" in (tmp_path / "grids.svg").read_text()


def judged(level: tuple[int, int], rule: tuple[int, int], wrong: int) -> dict[str, Any]:
    """A result in the form of `judged.json`; `level` and `rule` are cases too low and exact."""
    scores = {"probability": 0.13, "present rule": 0.2, "whole one-seed grid": 0.19, "always 16": 0.25}
    return {
        "one seed": {
            "brier": {name: {"all": score, "interval": [score - 0.02, score + 0.02]} for name, score in scores.items()},
            "picks": {
                name: {"cases": 54, "too low": low, "exact": exact}
                for name, (low, exact) in {"at 0.7": level, "present rule": rule}.items()
            },
        },
        "compare": {
            "means": [{"method": "bracket", "exact": 0.7, "exact_interval": [0.5, 0.9], "under": 0.1, "under_interval": [0.0, 0.2], "trainings": 3.8}],
            "adapters": [{"curves": 18, "false_passes": 1}, {"curves": 18, "false_passes": 0}],
        },
        "savings": {"stops": {"locked, 0.02": {"below 0.02": {"stopped": 9, "of these would have held": wrong}}}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("level", "rule", "wrong", "follows"),
    [
        ((1, 30), (5, 30), 0, [".7 becomes the default", "it is built"]),
        ((1, 29), (5, 30), 1, ["the rule stays", "it is dropped"]),
        ((5, 40), (5, 30), 0, ["the rule stays", "it is built"]),
    ],
)
def test_the_answers_follow_the_rules_that_were_written_down(
    level: tuple[int, int], rule: tuple[int, int], wrong: int, follows: list[str]
) -> None:
    found = judge_locked.answers(judged(level, rule, wrong))
    assert [found[1][2], found[4][2]] == follows
    assert found[0] == (
        "the probability of one seed",
        "Brier 0.130 (0.110 to 0.150); present rule 0.200, whole one-seed grid 0.190, always 16 0.250",
        "lower than all three",
    )
    assert found[3][1] == "1 false passes of 36"
    assert (
        "| the search (`bracket`) | exact 70% (50% to 90%), too low 10% (0% to 20%), 3.8 trainings | the claim |"
        in (judge_locked.answer_table(judged(level, rule, wrong)).splitlines())
    )


def test_a_panel_shows_errors_of_each_seed_at_the_best_learning_rate() -> None:
    curve = next(one for one in compare.whole_grids_of("real, 400 steps") if one.metric == "accuracy")
    by_seed = compare.losses_by_seed(curve)
    assert sorted(by_seed) == curve.seeds
    for rank in curve.ranks:
        assert np.mean([by_seed[seed][rank] for seed in curve.seeds]) == pytest.approx(1 + curve.best(rank))


def grid(folder: Path, seeds: list[int], partial: bool) -> Path:
    file = folder / "one.json"
    file.write_text(json.dumps({"curves": [{"seeds": seeds, "partial": partial}]}))
    return file


def test_a_touched_file_is_seen(tmp_path: Path, locked: Path) -> None:
    locks.lock(grid(tmp_path, [0], partial=True), "abc")
    test_every_locked_file_has_its_hash()
    (locked / "one.json").write_text("{}")
    with pytest.raises(AssertionError, match="touched"):
        test_every_locked_file_has_its_hash()


def test_only_a_partial_grid_takes_further_seeds(tmp_path: Path, locked: Path) -> None:
    locks.lock(grid(tmp_path, [0], partial=True), "abc")
    with pytest.raises(AssertionError, match="no further seed"):
        locks.lock(grid(tmp_path, [0], partial=True), "abc")
    locks.lock(grid(tmp_path, [0, 1], partial=False), "abc")
    with pytest.raises(AssertionError, match="whole"):
        locks.lock(grid(tmp_path, [0, 1, 2], partial=False), "abc")
