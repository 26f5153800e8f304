"""Test the atlas: rows are plausible and unique, and a larger margin never needs a larger rank."""

from __future__ import annotations

import re
from collections import Counter

from rightrank.atlas.counts import ATLAS_FILE, FAMILIES, Sweep, load_atlas


def make_sweep(**changes: object) -> Sweep:
    facts = {"id": "a", "source": "s", "family": "language", "kind": "loss"}
    figures = {"better": "low", "ranks": (1, 4, 16, 64), "values": (2.1, 2.004, 2.0, 2.001), "seeds": 1, "tuned": True}
    return Sweep(**{**facts, **figures, **changes})  # type: ignore[arg-type]


REFUSED = "vukrosic/qwen-lora-rank-selection"  # its licence grants nothing


def test_the_packaged_atlas_is_small_and_names_its_sources() -> None:
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


def test_no_two_rows_are_the_same_sweep() -> None:
    atlas = load_atlas()
    assert max(Counter(row.id for row in atlas.sweeps).values()) == 1
    printed = Counter((row.ranks, tuple(row.values)) for row in atlas.sweeps if len(set(row.values)) > 1)
    assert [key for key, times in printed.items() if times > 1] == []


def test_each_family_has_sweeps() -> None:
    assert {row.family for row in load_atlas().sweeps} == set(FAMILIES)


def test_a_sweep_says_nothing_between_and_beyond_its_ranks() -> None:
    row = make_sweep()
    assert [row.is_enough(rank) for rank in (1, 2, 4, 8, 256)] == [False, None, True, True, True]
    rising = make_sweep(values=(2.1, 2.06, 2.04, 2.0))
    assert rising.is_rising()
    assert [rising.is_enough(rank) for rank in (16, 64, 128)] == [False, None, None]
