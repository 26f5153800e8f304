"""The fault benchmark in short: a worker and the driver are killed, once each; workers are processes that sleep."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.scale.faults import FAULTS, Place, drive, judged, one_try


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "reference"
    drive(Place("processes", folder), lambda: None, 0)
    return folder


@pytest.mark.parametrize("name", ["worker killed", "driver killed, then resumed"])
def test_a_fault_changes_nothing(name: str, reference: Path, tmp_path: Path) -> None:
    one_try(Place("processes", tmp_path / "run"), FAULTS["processes", name], after=3)
    found = judged(tmp_path / "run", reference)
    assert found["right_decision"] == 1
    assert (found["lost"], found["doubled"]) == (0, 0)
    assert found["begun_again"] > 0
