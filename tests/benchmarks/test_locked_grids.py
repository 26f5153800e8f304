"""The locked grids are as they were when they were locked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.selection import locks


def test_every_locked_file_has_its_hash() -> None:
    files = {file.name for file in locks.LOCKED.glob("*.json")} - {locks.LOCK.name}
    assert files == set(locks.read_lock())
    for name, entry in locks.read_lock().items():
        assert locks.digest(locks.LOCKED / name) == entry["sha256"], f"{name} was touched after its lock"


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
