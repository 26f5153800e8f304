"""The fault benchmark in short: each fault once; workers are processes or Ray actors that sleep where they would train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins.cluster.faults import FAULTS, Work, one_try
from tests.plugins.cluster.places import Nodes, Place

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    work = Work(tmp_path_factory.mktemp("faults") / "reference")
    work.make_reference()
    return work


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    pytest.importorskip("ray")
    nodes = Nodes(sizes=(2,))  # actors take the longest to start
    yield nodes
    nodes.shutdown()


def require_right(work: Work, place: Place, fault: str) -> None:
    found = one_try(work, place, FAULTS[place.executor, fault], after=3)
    assert found["right_decision"] == 1, found
    assert (found["lost"], found["trained_twice"]) == (0, 0)


@pytest.mark.parametrize("fault", ["worker killed", "worker stopped for 4 s"])
def test_a_fault_of_a_process_changes_nothing(fault: str, work: Work, tmp_path: Path) -> None:
    place = Place("processes", tmp_path / "run")
    require_right(work, place, fault)
    assert any("killed by signal 9" in notice for notice in place.notices) == (fault == "worker killed")


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_driver_on_ray_that_is_killed_and_resumed_changes_nothing(work: Work, nodes: Nodes, tmp_path: Path) -> None:
    """`test_ray` kills actors and takes a node."""
    place = Place("ray", tmp_path / "run", nodes, nodes.address)
    require_right(work, place, "driver killed, then resumed")
    assert not place.notices
