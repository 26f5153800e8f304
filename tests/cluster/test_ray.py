"""Test a real Ray cluster of two nodes of different size on this machine: after a fault, the decision stays the same."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.runs import read_adapters, read_decision
from tests.watch import wait_until

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
        patch.setenv("RAY_worker_niceness", "0")  # 15 otherwise: beside other work they would stand still
        patch.setenv("RAY_enable_worker_prestart", "0")  # workers that nobody asks for
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 * 2**20}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield cluster
        finally:
            cluster.shutdown()


def leave(cluster: Any, node: Any, _driver: subprocess.Popen[bytes]) -> None:
    cluster.remove_node(node, allow_graceful=False)


def kill_driver(_cluster: Any, _node: Any, driver: subprocess.Popen[bytes]) -> None:
    driver.kill()


@pytest.mark.parametrize("strike", [leave, kill_driver])
def test_the_decision_after_a_fault_is_that_of_one_process(
    strike: Callable[[Any, Any, subprocess.Popen[bytes]], None],
    cluster: Any,
    scratch: Path,
    alone: Path,
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
) -> None:
    nodes = [cluster.add_node(num_cpus=cpus, object_store_memory=80 * 2**20) for cpus in (1, 2)]
    journal, log = tmp_path / "run/journal.jsonl", tmp_path / "log"
    command = [
        sys.executable,
        "-m",
        "tests.cluster.runs",
        str(model_folder),
        str(completion_file),
        str(tmp_path / "run"),
        cluster.address,
    ]
    with log.open("ab") as output:
        driver = subprocess.Popen(command, stdout=output, stderr=output)
        wait_until(
            lambda: driver.poll() is not None or (journal.exists() and "trial_finished" in journal.read_text()),
            "a trial has finished",
        )
        assert driver.poll() is None, log.read_text()
        strike(cluster, nodes[0], driver)
        if driver.wait() == -signal.SIGKILL:
            assert subprocess.run(command, stdout=output, stderr=output).returncode == 0, log.read_text()
    assert driver.returncode == (-signal.SIGKILL if strike is kill_driver else 0), log.read_text()
    assert read_decision(tmp_path / "run") == read_decision(alone)
    assert read_adapters(tmp_path / "run") == read_adapters(alone)
    if strike is leave:
        assert len(list(scratch.glob("rightrank-worker-*"))) <= 1  # that of the node that was removed
    for node in nodes[strike is leave :]:
        cluster.remove_node(node)
