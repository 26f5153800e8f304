"""The short forms of benchmarks/decide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.decide import calibration, published
from benchmarks.decide.simulated import World

pytestmark = pytest.mark.trains


def test_published_curves_are_picked_and_called_rising_as_stored() -> None:
    curves = published.curves()
    stored = json.loads((Path(published.__file__).parent / "published.json").read_text())
    ours = published.score(published.RULES["rightrank"], curves)
    assert ours == stored["scores"]["rightrank"]
    assert ours["acceptable"] >= 0.9 * len(curves)
    rising = published.rising(curves)
    assert rising == stored["rising"]
    assert rising["said of those"] >= 0.9 * rising["rise"]
    assert rising["said of others"] <= 0.1 * (len(curves) - rising["rise"])
    assert published.grids(curves) == stored["grids"]


def test_the_picks_do_not_depend_on_what_a_curve_is_called() -> None:
    for curve in published.curves():
        anonymous = {**curve, "id": "x", "source": "x", "model": "x", "dataset": "x"}
        assert published.ours(anonymous).rank == published.ours(curve).rank


@pytest.mark.parametrize("shape", ["power", "flat", "u_shaped", "rising"])
def test_simulated_tables_are_covered_and_rarely_misjudged(shape: str) -> None:
    """Loose, for 40 tables; benchmarks/decide/calibration.json has the figures."""
    found = calibration.study(World(shape, 3, 200, "heavy"), 40, 1)  # type: ignore[arg-type]
    assert found.covers >= 0.88
    assert found.false <= 0.1
    assert found.within_octave >= 0.8


def test_stored_calibration_meets_what_is_claimed_of_it() -> None:
    summary = json.loads((Path(calibration.__file__).parent / "calibration.json").read_text())["summary"]
    assert 0.93 <= summary["covers, two seeds or more"] <= 0.97
    assert summary["false acceptance, mean"] <= 0.05
    assert summary["within an octave, of all decided"] >= 0.95
