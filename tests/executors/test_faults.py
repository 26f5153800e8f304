"""The fault benchmark in short: one worker of three is killed; workers are processes that sleep where they would train."""

from __future__ import annotations

from pathlib import Path

from benchmarks.scale.faults import FAULTS, Place, drive, judged, one_try


def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    drive(Place("processes", tmp_path / "reference"), lambda: None, 0)
    place = Place("processes", tmp_path / "run")
    one_try(place, FAULTS["processes", "worker killed"], after=3)
    found = judged(tmp_path / "run", tmp_path / "reference")
    assert found["right_decision"] == 1
    assert (found["lost"], found["doubled"]) == (0, 0)
    assert any("killed by signal 9" in notice for notice in place.notices)
