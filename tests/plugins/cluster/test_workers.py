"""Real workers, one of which is killed: the same decision as in one process."""

from __future__ import annotations

import os
import signal
import socket
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest

from rightrank import select_rank
from rightrank.plugins.cluster.on_ray import connected, resources
from rightrank.plugins.cluster.worker import WORKER_MESSAGE, Ready, Setup, Stop, serve, versions
from rightrank.schema.errors import InputError, MissingExtraError, RunError, SettingsError
from rightrank.schema.events import Event, StepDone
from rightrank.schema.settings import make_settings
from tests.plugins.cluster.runs import STEPS, decision_of, values_of
from tests.tiny import small_settings
from tests.watch import Watch


def test_processes_come_to_the_same_decision_though_one_is_killed(
    alone: Path, model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_once(event: Event) -> None:
        if isinstance(event, StepDone) and not killed:
            workers = [
                child for child in psutil.Process().children() if "rightrank.plugins.cluster.worker" in child.cmdline()
            ]
            killed.append(max(worker.pid for worker in workers))
            os.kill(killed[0], signal.SIGKILL)

    notices: list[str] = []
    settings = small_settings(**STEPS, executor="processes", workers=2)
    watching = Watch(on_event=kill_once, notice=notices.append)
    select_rank(str(model_folder), completion_file, tmp_path / "run", settings=settings, callbacks=[watching])
    assert decision_of(tmp_path / "run") == decision_of(alone)
    assert values_of(tmp_path / "run") == values_of(alone)
    assert any("killed by signal 9" in notice for notice in notices)
    assert not [child for child in psutil.Process().children() if "rightrank.plugins.cluster.worker" in child.cmdline()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"executor": "procesess"}, "executor: got 'procesess'"),
        ({"workers": 2}, "workers was given and the executor is 'local'"),
        ({"executor": "processes", "ray_address": "a:1"}, "ray_address was given and the executor is 'processes'"),
        ({"executor": "ray", "workers": 0}, "workers: got 0"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_settings(changes)


def test_data_in_memory_needs_the_local_executor(model_folder: Path, tmp_path: Path) -> None:
    settings = small_settings(executor="processes", workers=2)
    with pytest.raises(SettingsError, match="the data is in memory"):
        select_rank(str(model_folder), [{"text": "a"}], tmp_path / "run", settings=settings)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'rightrank\[ray\]'"):
        connected(None)


def test_an_address_that_does_not_answer_is_reported() -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RunError, match=f"no Ray cluster answers at {address} within"):
        connected(address)
    with pytest.raises(InputError, match="give HOST:PORT"):
        connected("head-node")


def test_a_worker_sends_its_versions_and_whether_it_sees_the_run_folder(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").touch()
    for folder, seen in ((tmp_path, True), (tmp_path / "elsewhere", False)):
        setup = Setup(model="m", data="d", settings={}, fingerprint="f", folder=folder, working_folder=Path.cwd())
        sent = StringIO()
        serve(StringIO(setup.model_dump_json() + "\n" + Stop().model_dump_json() + "\n"), sent)
        assert WORKER_MESSAGE.validate_json(sent.getvalue()) == Ready(versions=versions(), sees_folder=seen)


def test_a_worker_reserves_what_the_plan_states() -> None:
    assert resources(3 * 2**30, on_cuda=False) == {"CPU": 1.0, "memory": 3.0 * 2**30}
    assert resources(None, on_cuda=False) == {"CPU": 1.0}
    assert resources(3 * 2**30, on_cuda=True) == {"CPU": 1.0, "GPU": 1.0}
