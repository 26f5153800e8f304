"""Test a real Ray cluster of two nodes of different size on this machine: if one leaves, the decision stays the same."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rightrank import select_rank
from rightrank.schema.events import Event
from rightrank.schema.trials import TrialFinished
from tests.plugins.cluster.runs import STEPS, read_decision, read_values
from tests.tiny import build_small_settings
from tests.watch import Watch

pytestmark = [
    pytest.mark.trains,
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder for the files of this cluster's workers, separate from workers of other tests."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def cluster(scratch: Path) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(scratch))
        patch.setenv("RAY_TMPDIR", "/tmp")  # the paths of Ray's sockets have to be short
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_worker_niceness", "0")  # 15 otherwise: beside other work they would stand still
        patch.setenv("RAY_enable_worker_prestart", "0")  # workers that nobody asks for
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 * 2**20}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        patch.setenv("RAY_ADDRESS", cluster.address)
        try:
            yield cluster
        finally:
            cluster.shutdown()


def test_a_node_leaves_and_the_decision_is_that_of_one_process(
    cluster: Any, scratch: Path, alone: Path, model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    nodes = [cluster.add_node(num_cpus=cpus, object_store_memory=80 * 2**20) for cpus in (1, 2)]
    removed: list[str] = []

    def take_a_node(event: Event) -> None:
        if isinstance(event, TrialFinished) and not removed:
            removed.append(event.trial_id)
            cluster.remove_node(nodes[0])

    settings = build_small_settings(**STEPS, executor="ray", workers=3)
    select_rank(
        str(model_folder), completion_file, tmp_path / "run", settings=settings, callbacks=[Watch(on_event=take_a_node)]
    )
    assert removed
    assert read_decision(tmp_path / "run") == read_decision(alone)
    assert read_values(tmp_path / "run") == read_values(alone)
    assert len(list(scratch.glob("rightrank-worker-*"))) <= 1  # that of the node that was taken
