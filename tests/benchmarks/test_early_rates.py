"""Check that the grids, the rule and the judgement of `benchmarks/early_rates` are as they were locked."""

from __future__ import annotations

import json

from benchmarks.early_rates import lock
from benchmarks.learning_rate.lock import hash_file


def test_what_is_committed_agrees_with_its_locks() -> None:
    locks = lock.read_lock()
    for key, names in (("code", lock.CODE), ("rule", lock.RULE)):
        assert locks[key] == {name: hash_file(lock.HERE / name) for name in names}
    for name, entry in locks["grids"].items():
        assert hash_file(lock.GRIDS / name) == entry["sha256"], name
    kinds = lock.HERE / "kinds"
    for name, digest in json.loads((kinds / "lock.json").read_text()).items():
        assert name.endswith((".py", ".md", ".jsonl")) or hash_file(kinds / name) == digest, name
