"""The scale benchmark in short: the simulated scheduler stays near the bound and loses nothing."""

from __future__ import annotations

import pytest
from benchmarks.scale.simulate import grid_of, lower_bound

pytestmark = pytest.mark.trains


def test_the_bound_is_the_largest_of_three() -> None:
    assert lower_bound([4.0, 4.0, 4.0, 4.0], 2) == 8.0  # the work
    assert lower_bound([9.0, 1.0, 1.0], 2) == 9.0  # the longest
    assert lower_bound([6.0, 5.0, 5.0], 2) == 10.0  # two that must share


@pytest.mark.parametrize("hours", [None, 2.0])
def test_a_grid_on_many_devices(hours: float | None) -> None:
    row = grid_of(400, 40, seed=0, mean_hours_to_loss=hours)
    assert row["each_once"]
    assert 1.0 <= row["makespan_over_bound"] < (1.1 if hours is None else 1.5)
    assert (row["begun_again"] > 0) == (hours is not None)
