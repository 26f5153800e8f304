"""A worker of two processes that share each batch (gloo, on a CPU), one of which is killed: the same decision."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from rightrank import select_rank
from rightrank.schema.errors import SettingsError
from rightrank.schema.events import Event, StepDone
from rightrank.schema.settings import make_settings
from tests.plugins.cluster.runs import STEPS, require_same
from tests.tiny import small_settings
from tests.watch import Watch


def workers_here() -> list[psutil.Process]:
    found = [child for child in psutil.Process().children() if "rightrank.plugins.cluster.worker" in child.cmdline()]
    return sorted(found, key=lambda process: process.create_time())


def test_two_processes_share_an_arm_though_one_is_killed(
    alone: Path, model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    killed: list[int] = []
    listening: set[str] = set()

    def kill_the_second(event: Event) -> None:
        if isinstance(event, StepDone) and not killed:
            workers = workers_here()
            assert len(workers) == 2
            sockets = [connection for worker in workers for connection in worker.net_connections()]
            listening.update(connection.laddr.ip for connection in sockets if connection.status == "LISTEN")
            killed.append(workers[1].pid)
            os.kill(workers[1].pid, signal.SIGKILL)

    notices: list[str] = []
    settings = small_settings(**STEPS, executor="processes", workers=1, devices_per_arm=2)
    watching = Watch(on_event=kill_the_second, notice=notices.append)
    select_rank(str(model_folder), completion_file, tmp_path / "run", settings=settings, callbacks=[watching])
    assert killed
    require_same(tmp_path / "run", alone)
    assert any("worker-1 was lost: killed by signal 9" in notice for notice in notices)
    assert not workers_here()
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices_per_arm": 2}, "devices_per_arm 2 needs executor processes or ray"),
        (
            {"devices_per_arm": 2, "executor": "processes", "launcher": "srun"},
            "devices_per_arm and launcher were both given",
        ),
        ({"devices_per_arm": 16, "executor": "ray"}, "batch_size 8 can't be split over devices_per_arm 16"),
    ],
)
def test_what_does_not_go_together_is_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_settings(changes)
