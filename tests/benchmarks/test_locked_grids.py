"""The locked grids are as they were when they were locked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks.selection import compare, locks


def test_every_locked_file_has_its_hash() -> None:
    files = {file.name for file in locks.LOCKED.glob("*.json*")} - {locks.LOCK.name}
    assert files == set(locks.read_lock())
    for name, entry in locks.read_lock().items():
        assert locks.digest(locks.LOCKED / name) == entry["sha256"], f"{name} was touched after its lock"


def test_no_table_reads_a_locked_grid() -> None:
    patterns = {pattern for files, _, _ in compare.FAMILIES.values() for pattern in files.split()}
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
