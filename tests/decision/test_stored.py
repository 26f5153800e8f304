"""Compare the decisions on 160 tables of every kind with the stored decisions.

Store them again with `python -m tests.decision.test_stored` if a change is intended, and read the diff: it shows what
changes for users. Numbers are compared up to rounding errors of sums.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.decision.worlds import (
    World,
    build_uneven_worlds,
    build_worlds,
    decide_world,
    require_equal,
    round_numbers,
)

STORED = Path(__file__).parent / "decisions.json"
WORLDS = build_worlds() | build_uneven_worlds()


def summarize_decision(world: World) -> dict[str, Any]:
    return decide_world(world).model_dump(mode="json")


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    decisions: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
    return decisions


def test_the_decision_is_the_stored_one(stored: dict[str, Any]) -> None:
    for name in WORLDS:
        require_equal(summarize_decision(WORLDS[name]), stored[name], name)


def test_the_stored_decisions_hold_every_verdict_flag_and_action(stored: dict[str, Any]) -> None:
    assert {decision["verdict"] for decision in stored.values()} == {
        "saturated", "rising", "overfitting", "flat", "undecided", "no_gain",
    }  # fmt: skip
    assert {flag for decision in stored.values() for flag in decision["flags"]} == {
        "underpowered", "lr_edge", "unstable", "one_seed", "selection_bias",
        "larger_rank_worse", "outlier", "unequal_length",
    }  # fmt: skip
    assert {run["action"] for decision in stored.values() for run in decision["next_runs"]} == {
        "seeds", "examples", "rank", "rates", "test", "none",
    }  # fmt: skip
    assert {decision["basis"] for decision in stored.values()} == {
        "examples and seeds", "examples", "seeds", "std", "values",
    }  # fmt: skip


if __name__ == "__main__":
    lines = [
        f"{json.dumps(name)}: {json.dumps(round_numbers(summarize_decision(world)))}" for name, world in WORLDS.items()
    ]
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
