"""The stored coverage of win rates, and a short form of the simulation."""

from __future__ import annotations

import json

from benchmarks.judged import by_loss, coverage


def test_the_stored_coverage_is_near_the_nominal_one() -> None:
    stored = json.loads(coverage.OUT.read_text(encoding="utf-8"))
    assert stored["summary"] == coverage.summary(stored["cases"])
    assert 0.93 <= stored["summary"]["all"]["cover"] <= 0.97
    assert stored["summary"]["all"]["false"] <= 0.055


def test_a_short_simulation_covers() -> None:
    found = coverage.case(0, 100, 5, 0.0, 0.2, 150)
    assert 0.9 <= found["cover"] <= 0.99


def test_the_oracles_decision_is_the_stored_one() -> None:
    stored = json.loads(by_loss.OUT.read_text(encoding="utf-8"))
    assert stored == by_loss.result()
    assert (stored["by_margin"]["0.05"]["rank"], stored["by_margin"]["0.05"]["verdict"]) == (16, "saturated")
