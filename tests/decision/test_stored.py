"""The rule on a hundred tables of every kind, beside what it said when they were stored.

Stored again, on purpose, with `python -m tests.decision.test_stored`. Look at the difference: it is what changed
for users. Figures are compared to the rounding of sums.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.decision.worlds import World, decide_in, worlds

STORED = Path(__file__).parent / "decisions.json"
WORLDS = worlds()


def said(world: World) -> dict[str, Any]:
    return decide_in(world).model_dump(mode="json")


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", WORLDS)
def test_the_decision_is_the_stored_one(name: str, stored: dict[str, Any]) -> None:
    require_same(said(WORLDS[name]), stored[name], name)


def test_the_stored_decisions_hold_every_verdict_flag_and_action(stored: dict[str, Any]) -> None:
    assert {decision["verdict"] for decision in stored.values()} == {
        "saturated", "rising", "overfitting", "flat", "undecided", "no_gain",
    }  # fmt: skip
    assert {flag for decision in stored.values() for flag in decision["flags"]} == {
        "underpowered", "rising", "lr_edge", "unstable", "one_seed", "winner_gap", "metric_conflict",
        "may_be_capacity_limited", "larger_rank_worse",
    }  # fmt: skip
    assert {run["action"] for decision in stored.values() for run in decision["next_runs"]} == {
        "seeds", "items", "rank", "rates", "test", "data", "none",
    }  # fmt: skip
    assert {decision["basis"] for decision in stored.values()} == {
        "items and seeds", "items", "seeds", "std", "values",
    }  # fmt: skip


def require_same(got: Any, stored: Any, where: str) -> None:
    """Equal but for rounding."""
    if isinstance(stored, dict):
        assert got.keys() == stored.keys(), where
        for key in stored:
            require_same(got[key], stored[key], f"{where}.{key}")
    elif isinstance(stored, list):
        assert len(got) == len(stored), where
        for number, (ours, theirs) in enumerate(zip(got, stored, strict=True)):
            require_same(ours, theirs, f"{where}.{number}")
    elif isinstance(stored, float):
        assert got == pytest.approx(stored, rel=1e-6, abs=1e-9), where
    else:
        assert got == stored, where


def shortened(value: Any) -> Any:
    """Numbers to nine digits: what is compared, and no more."""
    if isinstance(value, dict):
        return {key: shortened(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shortened(inner) for inner in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(shortened(said(world)))}" for name, world in WORLDS.items()]
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
