"""Check that the stored grids are complete, that the locked ones are unchanged, and that pages and pictures state the stored results."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pytest
from benchmarks.results import read_bytes, read_json
from benchmarks.science import PAGE, TABLES, replace_tables
from benchmarks.selection import compare
from benchmarks.selection.tables import read_grids

STORED = compare.HERE
LOCK = json.loads((STORED / "locked" / "lock.json").read_text(encoding="utf-8"))


@pytest.mark.trains
@pytest.mark.parametrize(
    ("name", "grids", "cells", "seeds"),
    [("planted", 64, 20, 2), ("planted_new", 40, 20, 3), ("linear", 36, 24, 2)],
)
def test_stored_grids_are_whole(name: str, grids: int, cells: int, seeds: int) -> None:
    curves = read_grids(STORED / f"{name}_grids.json.xz")
    assert len({curve.name for curve in curves}) == len(curves) == grids
    assert {curve.size for curve in curves} == {cells}
    assert {len(curve.seeds) for curve in curves} == {seeds}


@pytest.mark.trains
def test_long_grids_are_whole() -> None:
    files = [*(STORED / "grids").glob("*.json.xz"), *(STORED / "locked").glob("*.json.xz")]
    assert len(files) == 9
    for file in files:
        (curve,), (entry,) = read_grids(file), read_json(file)["curves"]
        assert curve.ranks == [1, 4, 16, 64]
        assert curve.seeds == [0, 1, 2]
        cells = [seeds for by_rate in curve.cells.values() for seeds in by_rate.values()]
        assert len(cells) <= 4 * len(curve.learning_rates)  # those that diverged are missing
        assert len(curve.items) == sum(len(seeds) for seeds in cells)
        assert not entry["partial"]
        assert (
            set(curve.checkpoints) == {0.125, 0.25, 0.5} == {float(fraction) for fraction in entry["checkpoint_items"]}
        )
        assert set(curve.tests) <= {"trained", "truncated"} | {"recovered"} == set(entry["test_items"])


@pytest.mark.trains
def test_wide_grids_are_whole() -> None:
    """Check that each grid has six seeds, and the values of 4,096 test examples for every adapter."""
    files = sorted((STORED / "wide").glob("*.json.xz"))
    assert len(files) == 8
    for file in files:
        (curve,) = read_grids(file)
        assert curve.seeds == list(range(6))
        with np.load(file.with_name(file.name.replace(".json.xz", ".npz"))) as arrays:
            assert len(arrays["tokens"]) == 4096
            assert arrays["losses"].shape == (len(arrays["cells"]), 4096)
            stored_cells = {(int(rank), float(rate), int(seed)) for rank, rate, seed in arrays["cells"]}
        cells = {
            (rank, rate, seed) for rank, by_rate in curve.cells.items() for rate, row in by_rate.items() for seed in row
        }
        assert cells == stored_cells


@pytest.mark.trains
@pytest.mark.parametrize("name", LOCK)
def test_a_locked_file_has_its_hash(name: str) -> None:
    content = read_bytes(STORED / "locked" / name)
    assert hashlib.sha256(content).hexdigest() == LOCK[name]["sha256"], f"{name} was touched after its lock"


@pytest.mark.trains
def test_every_locked_file_has_a_lock() -> None:
    assert {file.name for file in (STORED / "locked").glob("*.json.xz")} == set(LOCK)


@pytest.mark.trains
def test_no_table_reads_a_locked_grid() -> None:
    patterns = {pattern for files, _, _ in compare.FAMILIES.values() for pattern in files.split()}
    paths = {path for pattern in patterns for path in compare.HERE.glob(pattern)}
    assert {path.parent.name for path in paths} == {"selection", "grids"}
    assert not {path.name for path in paths} & set(LOCK)


@pytest.mark.trains
def test_an_interval_over_grids_holds_the_mean_and_is_exact_where_all_agree() -> None:
    low, high = compare.compute_share_interval(np.array([0.0, 1.0, 0.5, 1.0]), np.array([3.0, 3.0, 6.0, 3.0]))
    assert low < 0.6 < high
    assert compare.compute_share_interval(np.ones(16), np.ones(16)) == [0.794, 1.0]
    assert compare.compute_share_interval(np.zeros(16), np.ones(16)) == [0.0, 0.206]


@pytest.mark.trains
def test_tables_are_those_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == replace_tables(page), "a result changed: run `python -m benchmarks.science`"


@pytest.mark.trains
def test_every_table_has_its_place_and_rows() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"<!-- table: (\w+) -->", page) == list(TABLES)
    for make in TABLES.values():
        assert make().count("\n") >= 3
