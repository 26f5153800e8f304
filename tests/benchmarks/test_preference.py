"""The preference study in short: its pairs, and what the stored grid says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.preference.pairs import pairs
from benchmarks.selection.replay import replay_all, summary
from benchmarks.selection.tables import read_grids

from rightrank.schema.metrics import PAIR_MARGIN
from rightrank.search import STRATEGIES

GRIDS = Path(__file__).parents[2] / "benchmarks/preference/grids.json"
LN2 = 0.69315


def test_the_rejected_gloss_begins_alike_and_is_of_another_word() -> None:
    glosses = {
        "ayin": "the 16th letter",
        "beth": "the 2nd letter",
        "blow": "a hard hit",
        "cord": "a thin rope",
        "so": "thus",
    }
    rows = [{"prompt": f"{word}: ", "completion": gloss} for word, gloss in glosses.items()]
    found = {row["prompt"]: (row["chosen"], row["rejected"]) for row in pairs(rows)}
    assert found["ayin: "] == ("the 16th letter", "the 2nd letter")
    assert "so: " not in found  # too short, and nothing begins alike
    assert all(chosen.split()[0] == rejected.split()[0] for chosen, rejected in found.values())


def test_the_stored_grid_starts_from_ln_2() -> None:
    (curve,) = json.loads(GRIDS.read_text(encoding="utf-8"))["curves"]
    assert curve["base"] == pytest.approx(LN2, abs=1e-4)
    assert set(curve["item_tokens"]) == {1}
    assert len(curve["seeds"]) == 2


def test_the_strategy_finds_the_rank_of_the_grid() -> None:
    found = summary(replay_all(read_grids(GRIDS), STRATEGIES["bracket"], PAIR_MARGIN))
    assert found["exact_or_neighbour"] == found["curves"] == 1
    assert found["under_picks"] == 0
