"""The fault benchmark in short: one worker of three is killed; workers are processes that sleep where they would train."""

from __future__ import annotations

from pathlib import Path

from benchmarks.scale.faults import FAULTS, Work, one_try
from benchmarks.scale.places import Place


def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    work = Work(tmp_path / "reference")
    work.make_reference()
    place = Place("processes", tmp_path / "run")
    found = one_try(work, place, FAULTS["processes", "worker killed"], after=3)
    assert found["right_decision"] == 1
    assert (found["lost"], found["trained_twice"]) == (0, 0)
    assert any("killed by signal 9" in notice for notice in place.notices)
