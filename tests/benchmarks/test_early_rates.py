"""Check that code, rule and grids of `benchmarks/early_rates` are as they were locked."""

from __future__ import annotations

from benchmarks.early_rates import lock
from benchmarks.learning_rate.lock import hash_file


def test_what_is_committed_agrees_with_its_locks() -> None:
    locks = lock.read_lock()
    files = {lock.HERE / name: sha for key in ("code", "rule") for name, sha in locks[key].items()}
    files |= {lock.GRIDS / name: entry["sha256"] for name, entry in locks["grids"].items()}
    assert [path.name for path, sha in files.items() if hash_file(path) != sha] == []
