"""Eight kinds of fault of several hosts, made of namespaces: a tiny model, a Ray cluster, and a disk that they share."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.plugins.cluster.hosts import (
    Field,
    Found,
    Work,
    is_right,
    one_run,
    reference_of,
)
from tests.plugins.cluster.namespaces import Network, why_impossible

pytestmark = pytest.mark.trains

SHORT = (  # several trainings: a fault that starts things anew waits for the next one
    "--strategy grid --ranks 1,4 --learning-rates 3e-3,1e-2 --seeds 0,1 --max-steps 12 --batch-size 4 --seq-len 32 "
    "--eval-items 12"
)
KINDS = [  # the last three wait for a training that begins after the fault before
    "link of 1 Mbit and 300 ms",
    "disk full",
    "clock off by an hour",
    "partition, healed",
    "worker stopped, continued",
    "worker killed",
    "head killed, restarted",
    "node killed",
]


@pytest.fixture
def field(model_folder: Path, completion_file: Path, tmp_path: Path) -> Iterator[Field]:
    pytest.importorskip("ray")
    if reason := why_impossible():
        pytest.skip(reason)
    work = Work("tiny", model_folder, completion_file, tuple(SHORT.split()))
    with Network(3) as network:
        field = Field(network, random.Random(0), work, "ray", tmp_path, workers_wanted=1)
        work.put_on(network.shared)
        yield field


@pytest.fixture
def right(field: Field) -> Found:
    """The selection in one process, while the cluster starts."""
    with ThreadPoolExecutor() as threads:
        started = threads.submit(field.keep_nodes)
        right = reference_of(field)
        started.result()
    return right


def test_faults_of_eight_kinds_lose_nothing(field: Field, right: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.plugins.cluster.hosts.PAUSE", (0.1, 0.3))
    monkeypatch.setattr("tests.plugins.cluster.hosts.LONGEST", 2.5)
    left, rows = list(KINDS), []
    while left and len(rows) < 10:  # a fast machine may end before the last fault
        row, left = one_run(field, f"run-{len(rows)}", left, right)
        rows.append(row)
        assert is_right(row), row
        assert row["adapters_compared"] >= 4
    assert not left
    assert sorted(fault["kind"] for row in rows for fault in row["faults"]) == sorted(KINDS)
