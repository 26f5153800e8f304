"""Run the fault benchmark in a short form, each fault once; workers are processes or Ray actors that sleep instead of training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins.cluster.faults import FAULTS, Work, try_fault
from tests.plugins.cluster.places import Nodes, Site

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


def require_right(work: Work, site: Site, fault: str) -> None:
    result = try_fault(work, site, FAULTS[site.executor, fault], num_outcomes=3)
    assert result["right_decision"] == 1, result
    assert (result["lost"], result["trained_twice"]) == (0, 0)


@pytest.mark.parametrize("fault", ["worker killed", "worker stopped for 4 s"])
def test_a_fault_of_a_process_changes_nothing(fault: str, work: Work, tmp_path: Path) -> None:
    site = Site("processes", tmp_path / "run")
    require_right(work, site, fault)
    assert any("killed by signal 9" in notice for notice in site.notices) == (fault == "worker killed")


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_driver_on_ray_that_is_killed_and_resumed_changes_nothing(work: Work, nodes: Nodes, tmp_path: Path) -> None:
    """`test_ray` kills actors and takes a node."""
    site = Site("ray", tmp_path / "run", nodes, nodes.address)
    require_right(work, site, "driver killed, then resumed")
    assert not site.notices
