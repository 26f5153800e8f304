"""Check that the stored grids are complete, that the locked ones are unchanged, and that pages and pictures state the stored results."""

from __future__ import annotations

import hashlib
import json

import pytest
from benchmarks.results import read_bytes
from benchmarks.science import PAGE, replace_tables
from benchmarks.selection import compare

STORED = compare.HERE
LOCK = json.loads((STORED / "locked" / "lock.json").read_text(encoding="utf-8"))


@pytest.mark.trains
@pytest.mark.parametrize("name", LOCK)
def test_a_locked_file_has_its_hash(name: str) -> None:
    content = read_bytes(STORED / "locked" / name)
    assert hashlib.sha256(content).hexdigest() == LOCK[name]["sha256"], f"{name} was touched after its lock"


@pytest.mark.trains
def test_tables_are_those_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == replace_tables(page), "a result changed: run `python -m benchmarks.science`"
