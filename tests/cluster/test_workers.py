"""Test real workers: after a fault, the decision is the same as in one process."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import psutil
import pytest

from rightrank import select_rank
from rightrank.cluster import on_ray
from rightrank.cluster import worker as workers
from rightrank.cluster.on_ray import RayWorker, connect
from rightrank.cluster.processes import ProcessBackend
from rightrank.cluster.worker import (
    SelectionRefused,
    StopTask,
    Task,
    TaskEnded,
    WorkerLost,
    WorkerReady,
    WorkerSetup,
    collect_versions,
)
from rightrank.runs.selection import SelectionRequest
from rightrank.schema.errors import MissingExtraError, RunError, SettingsError
from rightrank.schema.events import Event, StepDone
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Trial, TrialFinished, TrialOutcome
from tests.cluster.simulated import STEPS, make_result, make_trials, read_decision, read_values
from tests.tiny import build_small_settings
from tests.watch import Watch


def make_setup(folder: Path) -> WorkerSetup:
    return WorkerSetup(SelectionRequest("m", None, "d", SelectSettings()), "f", folder, Path.cwd())


def list_worker_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "rightrank.cluster.worker" in child.cmdline()]


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped for a while"])
def test_processes_come_to_the_same_decision_after_a_fault(
    fault: signal.Signals,
    alone: Path,
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker is killed or stopped while it trains, and from then on the driver's clock is off by an hour."""
    struck: list[int] = []
    clock = time.time

    def strike_once(event: Event) -> None:
        if isinstance(event, StepDone) and not struck:
            struck.append(max(worker.pid for worker in list_worker_processes()))
            os.kill(struck[0], fault)
            monkeypatch.setattr(time, "time", lambda: clock() - 3600)
            if fault == signal.SIGSTOP:
                Timer(1.0, os.kill, (struck[0], signal.SIGCONT)).start()

    notices: list[str] = []
    settings = build_small_settings(**STEPS, executor="processes", workers=2)
    watching = Watch(on_event=strike_once, notice=notices.append)
    select_rank(str(model_folder), completion_file, tmp_path / "run", settings=settings, callbacks=[watching])
    assert read_decision(tmp_path / "run") == read_decision(alone)
    assert read_values(tmp_path / "run") == read_values(alone)
    assert any("killed by signal 9" in notice for notice in notices) == (fault == signal.SIGKILL)
    assert not list_worker_processes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"executor": "procesess"}, "executor: got 'procesess'"),
        ({"workers": 2}, "workers was given and the executor is 'local'"),
        ({"executor": "ray", "workers": 0}, "workers: got 0"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        SelectSettings(**changes)


def test_data_in_memory_needs_the_local_executor(model_folder: Path, tmp_path: Path) -> None:
    settings = build_small_settings(executor="processes", workers=2)
    with pytest.raises(SettingsError, match="the data is in memory"):
        select_rank(str(model_folder), [{"text": "a"}], tmp_path / "run", settings=settings)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'rightrank\[ray\]'"):
        connect()


def test_an_address_that_does_not_answer_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RunError, match=f"no Ray cluster answers at {address} within"):
        connect()
    monkeypatch.setenv("RAY_ADDRESS", "head-node")
    with pytest.raises(
        RunError, match="cannot connect to the Ray cluster at RAY_ADDRESS=head-node: Invalid address format"
    ):
        connect()


def test_a_worker_sends_its_versions_and_whether_it_sees_the_run_folder(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").touch()
    for folder, sees_folder in ((tmp_path, True), (tmp_path / "elsewhere", False)):
        backend = ProcessBackend(make_setup(folder), tmp_path / "logs")
        backend.start("worker-1")
        try:
            assert backend.messages(60.0) == [
                ("worker-1", WorkerReady(versions=collect_versions(), sees_folder=sees_folder))
            ]
            backend.send("worker-1", StopTask())
        finally:
            backend.close()
        assert backend.messages(5.0) == [
            ("worker-1", WorkerLost(f"exit status 0 (see {tmp_path / 'logs/worker-1.log'})"))
        ]


def test_a_worker_that_finds_other_data_refuses(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    sent: list[Any] = []
    request = SelectionRequest(str(model_folder), None, completion_file, build_small_settings(ranks=(1, 4)))
    worker = workers.Worker(WorkerSetup(request, "of the driver", tmp_path, Path.cwd()), sent.append)
    worker.run_task(Task(trials=make_trials(1), base_loss=None))
    worker.close()
    assert [type(message) for message in sent] == [SelectionRefused, TaskEnded]
    assert f"reads a different model or different data at {model_folder} and {completion_file}" in sent[0].reason


@pytest.mark.parametrize(
    ("planned", "on_cuda", "reserved"),
    [
        (3 * 2**30, False, {"num_cpus": 1.0, "num_gpus": 0, "memory": 3.0 * 2**30}),
        (None, False, {"num_cpus": 1.0, "num_gpus": 0, "memory": None}),
        (3 * 2**30, True, {"num_cpus": 1.0, "num_gpus": 1.0, "memory": None}),
    ],
)
def test_a_worker_reserves_what_the_plan_states(
    planned: int | None, on_cuda: bool, reserved: dict[str, float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = MagicMock()
    ray.nodes.return_value = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0, "memory": 2.0**36}}]
    monkeypatch.setattr(on_ray, "connect", lambda: ray)
    on_ray.RayBackend(MagicMock(), planned, on_cuda).start("worker-0")
    options = ray.remote.return_value.options.call_args.kwargs
    assert {name: options[name] for name in reserved} == reserved


class FullAtFirst:
    """An executor on a disk that is full for a while."""

    def __init__(self, failures: list[OSError]) -> None:
        self._failures = failures

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        for trial in trials:
            if self._failures and trial.arm.rank > 1:
                raise self._failures.pop()
            yield make_result(trial)


@pytest.mark.parametrize(("seconds", "ends"), [(60.0, [TaskEnded]), (-1.0, [SelectionRefused, TaskEnded])])
def test_a_worker_waits_for_a_full_disk(monkeypatch: pytest.MonkeyPatch, seconds: float, ends: list[type]) -> None:
    full = [OSError(errno.ENOSPC, "No space left on device") for _ in range(2)]
    sent: list[Any] = []
    monkeypatch.setattr(workers, "DISK_PAUSE", 0.01)
    monkeypatch.setattr(workers, "DISK_SECONDS", seconds)
    monkeypatch.setattr(workers.Worker, "make_executor", lambda *_: FullAtFirst(full))
    worker = workers.Worker(make_setup(Path()), sent.append)
    worker.run_task(Task(trials=make_trials(2), base_loss=None))
    worker.close()
    finished = [message.trial_id for message in sent if isinstance(message, TrialFinished)]
    assert finished == [trial.trial_id for trial in make_trials(2 if seconds > 0 else 1)]
    texts = [getattr(message, "text", getattr(message, "reason", "")) for message in sent]
    assert sum("No space left on device" in text for text in texts) == 1
    assert [type(message) for message in sent][-len(ends) :] == ends


def test_an_actor_whose_worker_ends_ends_its_stream(tmp_path: Path) -> None:
    """Otherwise the driver would wait for it as for one that hangs."""
    actor = RayWorker(make_setup(tmp_path))
    actor.receive(StopTask())
    actor.receive(None)
    assert list(actor.messages()) == [WorkerReady(collect_versions(), sees_folder=False)]


class LostHead:
    """As much of Ray as `RayBackend` asks when the head that it joined is gone."""

    class exceptions:  # noqa: N801 - as Ray has it
        class RayError(Exception):
            pass

    is_other = False

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]

    def exists(self, _key: bytes) -> bool:
        if self.is_other:
            raise self.exceptions.RayError("WrongClusterID")
        return False


@pytest.mark.parametrize("how", ["another answers", "none answers for a while"])
def test_a_lost_head_ends_the_run_with_one_line(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray, silent = LostHead(), list[RunError]()

    def answer() -> None:
        if silent:
            raise silent[0]

    monkeypatch.setattr(on_ray, "connect", lambda: ray)
    monkeypatch.setattr(on_ray, "_require_reachable_head", answer)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.experimental.internal_kv", SimpleNamespace(_internal_kv_exists=ray.exists))
    backend = on_ray.RayBackend(make_setup(Path()), None, on_cuda=False)
    backend._actors["worker-1"] = object()
    assert backend.messages(0.0) == []
    backend._next_head_check = 0.0
    if how == "another answers":
        ray.is_other = True
    else:
        silent.append(RunError("no Ray cluster answers"))
        assert backend.messages(0.0) == []  # it may come back
        backend._next_head_check, backend._last_head_answer = 0.0, backend._last_head_answer - on_ray.SILENT_SECONDS
    lost = WorkerLost("the head of the Ray cluster was lost", is_machine_lost=True)
    assert [backend.messages(0.0), backend.messages(0.0)] == [[("worker-1", lost)], []]
    backend.send("worker-1", StopTask())  # before the pool has read that it is lost
    with pytest.raises(
        RunError, match="head of the Ray cluster was lost; restart the cluster and repeat the same command"
    ):
        backend.start("worker-2")


@pytest.mark.parametrize(
    ("text", "reason", "with_machine"),
    [
        ("The actor died.\n\tid: 1\nThe actor died because its node has died. Node Id: 7", "its node has died", True),
        ("The actor died.\nThe actor is dead because its worker process has died. Worker", "process has died", False),
        ("the stream ended", "RuntimeError: the stream ended", False),
    ],
)
def test_the_line_of_a_lost_actor_says_why(text: str, reason: str, with_machine: bool) -> None:
    lost = on_ray._describe_loss(RuntimeError(text))
    assert lost.reason.endswith(reason)
    assert lost.is_machine_lost == with_machine
