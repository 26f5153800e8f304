"""Check that the grids of `benchmarks/learning_rate` are as they were locked."""

from __future__ import annotations

from benchmarks.learning_rate import lock


def test_what_is_committed_agrees_with_its_locks() -> None:
    locks = lock.read_lock()
    assert set(locks["code"]) == set(lock.CODE)
    for name, entry in locks["grids"].items():
        assert lock.hash_file(lock.GRIDS / name) == entry["sha256"], name
