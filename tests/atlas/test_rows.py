"""Test the atlas: rows are plausible and unique, and a larger margin never needs a larger rank."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise

import pytest

from rightrank.atlas.counts import ATLAS_FILE, FAMILIES, MARGINS, Sweep, load_atlas
from tests.atlas.readings import READS, check_rows, read_figures


def make_sweep(**changes: object) -> Sweep:
    facts = {"id": "a", "source": "s", "family": "language", "kind": "loss"}
    figures = {"better": "low", "ranks": (1, 4, 16, 64), "values": (2.1, 2.004, 2.0, 2.001), "seeds": 1, "tuned": True}
    return Sweep(**{**facts, **figures, **changes})  # type: ignore[arg-type]


TRIED = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
REFUSED = "vukrosic/qwen-lora-rank-selection"  # its licence grants nothing


def test_the_packaged_atlas_is_small_and_has_what_a_reader_checks() -> None:
    assert ATLAS_FILE.stat().st_size <= 200_000
    atlas = load_atlas()
    assert len(atlas.sweeps) >= 250
    assert len(atlas.sources) >= 60
    assert {row.source for row in atlas.sweeps} == set(atlas.sources)
    for name, source in atlas.sources.items():
        assert source["address"].startswith("https://") or name == "rightrank", name
        assert source["licence"], name
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", source["read"]), name
        assert REFUSED not in source["address"]
    for row in json.loads(ATLAS_FILE.read_text(encoding="utf-8"))["sweeps"]:
        read = row.get("read", {}).keys()
        assert READS & read or atlas.sources[row["source"]]["kind"] == "paper", f"{row['id']}: no program reads it"


def test_the_rows_of_our_own_grids_are_those_of_the_grids() -> None:
    content = json.loads(ATLAS_FILE.read_text(encoding="utf-8"))
    ours = {"sources": content["sources"], "sweeps": [r for r in content["sweeps"] if r["source"] == "rightrank"]}
    outcome = check_rows(ours, None)
    assert len(outcome["same"]) == len(ours["sweeps"]) >= 6


def test_no_two_rows_are_the_same_sweep() -> None:
    atlas = load_atlas()
    assert max(Counter(row.id for row in atlas.sweeps).values()) == 1
    printed = Counter((row.ranks, tuple(row.values)) for row in atlas.sweeps if len(set(row.values)) > 1)
    assert [key for key, times in printed.items() if times > 1] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_sweeps(family: str) -> None:
    assert any(row.family == family for row in load_atlas().sweeps)


def test_the_smallest_enough_rank_falls_as_the_margin_grows() -> None:
    for row in load_atlas().sweeps:
        ranks = [row.find_smallest_rank(margin) for margin in TRIED]
        assert all(later <= earlier for earlier, later in pairwise(ranks)), row.id
        assert row.find_smallest_rank(None) in row.ranks


def test_a_sweep_says_nothing_between_and_beyond_its_ranks() -> None:
    row = make_sweep()
    assert [row.is_enough(rank, 0.005) for rank in (1, 2, 4, 8, 256)] == [False, None, True, True, True]
    assert [row.is_enough(rank, 0.001) for rank in (1, 4, 8, 16)] == [False, False, None, True]
    rising = make_sweep(values=(2.1, 2.06, 2.04, 2.0))
    assert rising.is_rising(0.005)
    assert [rising.is_enough(rank, 0.005) for rank in (16, 64, 128)] == [False, None, None]


def test_noise_and_direction() -> None:
    assert make_sweep(noise=0.2).find_smallest_rank(0.005) == 1
    higher = make_sweep(better="high", kind="accuracy", values=(0.7, 0.8, 0.81, 0.79))
    assert (higher.find_smallest_rank(0.01), higher.find_smallest_rank(0.001)) == (4, 16)


def test_every_row_can_be() -> None:
    atlas = load_atlas()
    for row in atlas.sweeps:
        assert row.source in atlas.sources, row.id
        assert (row.family in FAMILIES, row.kind in MARGINS, row.better in ("low", "high")) == (True, True, True), (
            row.id
        )
        assert len(row.ranks) == len(row.values) >= 2, row.id
        assert list(row.ranks) == sorted(set(row.ranks)), row.id
        assert row.ranks[0] >= 1, row.id
        assert row.seeds >= 1, row.id
        assert row.noise is None or row.noise >= 0, row.id


def test_figures_are_read_again_from_tables_records_and_logs() -> None:
    texts = {
        "a.csv": "r,lr,seed,loss\n4,1e-4,0,2.0\n4,1e-4,1,2.2\n4,1e-3,0,1.9\n4,1e-3,1,2.1\n8,1e-4,0,1.8\n8,1e-4,1,2.0\n",
        "r4.json": json.dumps({"test": {"acc": 0.5}}),
        "r8.json": json.dumps({"test": {"acc": 0.6}}),
        "log.txt": "rank 4: 50.0%\nrank 8: 60.0%\n",
    }
    table = read_figures(
        {"file": "a.csv", "rank": "r", "value": "loss", "rate": "lr", "seed": "seed"}, "low", texts.__getitem__
    )
    assert (table["ranks"], table["values"], table["seeds"], table["tuned"]) == ([4, 8], [2.0, 1.9], 2, False)
    assert table["noise"] == pytest.approx(0.14142, abs=1e-5)
    files = read_figures({"file": "r{rank}.json", "ranks": [4, 8], "value": "test.acc"}, "high", texts.__getitem__)
    log = read_figures(
        {"file": "log.txt", "pattern": r"rank (?P<rank>\d+): (?P<value>[\d.]+)%", "scale": 0.01},
        "high",
        texts.__getitem__,
    )
    assert files["values"] == log["values"] == [0.5, 0.6]


def test_figures_are_read_again_from_seeds_in_files_and_from_grids() -> None:
    looks = '{"step": 1, "m": {"loss": 9}}\n\n{"step": 2, "m": {"loss": %s}}\n'
    texts = {
        **{f"{name}.jsonl": looks % value for name, value in {"a": 2.0, "b": 2.2, "c": 1.8, "d": 1.9}.items()},
        "grids.json": json.dumps({"curves": [{"id": "x"}, {"id": "y", "grid": {"4": {"0.1": {"0": 1.0, "1": 3.0}}}}]}),
        "state4.json": json.dumps({"log": [{"loss": 3.0}, {"loss": 2.5}]}),
    }
    seeds = {
        "files": {"4": ["a.jsonl", "b.jsonl"], "8": ["c.jsonl", "d.jsonl"]},
        "value": "m.loss",
        "where": {"step": 2},
    }
    figures = read_figures(seeds, "low", texts.__getitem__)
    assert (figures["ranks"], figures["values"], figures["seeds"]) == ([4, 8], [2.1, 1.85], 2)
    grid = {"file": "grids.json", "at": "curves", "where": {"id": "y"}, "grid": "grid"}
    assert read_figures(grid, "low", texts.__getitem__)["values"] == [2.0]
    last = {"file": "state{rank}.json", "ranks": [4], "value": "log.-1.loss"}
    assert read_figures(last, "low", texts.__getitem__)["values"] == [2.5]
