"""Test real workers: after a fault, the decision and the adapters are the same as in one process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import psutil
import pytest

from rightrank import select_rank
from rightrank.cluster import workers
from rightrank.cluster.workers import RayBackend, Worker, WorkerSetup, collect_versions
from rightrank.runs.selection import SelectionRequest
from rightrank.schema.errors import InputError, InterruptedRun, MissingExtraError, RunError, SettingsError
from rightrank.schema.events import Event, StepDone
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Trial, TrialOutcome
from tests.cluster.runs import STEPS, make_result, make_trials, read_adapters, read_decision
from tests.tiny import build_small_settings
from tests.watch import Watch, wait_until


def make_setup(folder: Path) -> WorkerSetup:
    (folder / "workers").mkdir(exist_ok=True)
    request = SelectionRequest("m", None, "d", SelectSettings())
    return WorkerSetup(request, "f", folder, Path.cwd(), collect_versions())


def list_worker_processes(parent: int | None = None) -> list[psutil.Process]:
    return [child for child in psutil.Process(parent).children() if "LokyProcess" in " ".join(child.cmdline())]


def test_processes_come_to_the_same_decision_after_one_is_killed(
    alone: Path, model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    struck: list[int] = []

    def strike_once(event: Event) -> None:
        if isinstance(event, StepDone) and not struck:
            struck.append(max(worker.pid for worker in list_worker_processes()))
            os.kill(struck[0], signal.SIGKILL)

    notices: list[str] = []
    settings = build_small_settings(**STEPS, workers=2)
    watching = Watch(on_event=strike_once, notice=notices.append)
    select_rank(str(model_folder), completion_file, tmp_path / "run", settings=settings, callbacks=[watching])
    assert read_decision(tmp_path / "run") == read_decision(alone)
    assert read_adapters(tmp_path / "run") == read_adapters(alone)
    assert any("was lost: The exit codes of the workers are {SIGKILL(-9)}" in notice for notice in notices)
    assert not list_worker_processes()


def test_workers_stop_when_their_driver_is_killed_and_the_same_command_resumes(
    alone: Path, model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "tests.cluster.runs", str(model_folder), str(completion_file), str(run)]
    environment = os.environ | {"TMPDIR": str(scratch)}
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    wait_until(lambda: driver.poll() is not None or any(run.glob("workers/*.jsonl")), "a worker trains")
    orphans = list_worker_processes(driver.pid)
    driver.kill()
    driver.wait()
    assert orphans
    assert subprocess.run(command, env=environment, stderr=subprocess.DEVNULL).returncode == 0
    assert read_decision(run) == read_decision(alone)
    assert read_adapters(run) == read_adapters(alone)
    wait_until(lambda: not any(orphan.is_running() for orphan in orphans), "the workers have ended")
    assert not any(scratch.glob("rightrank-worker-*"))


@pytest.mark.parametrize(
    ("changes", "message"), [({"workers": 0}, "workers: got 0"), ({"executor": "ray"}, "unknown setting 'executor'")]
)
def test_settings_that_are_not_allowed_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        SelectSettings(**changes)


def test_data_in_memory_needs_this_process(model_folder: Path, tmp_path: Path) -> None:
    settings = build_small_settings(workers=2)
    with pytest.raises(SettingsError, match="the data is in memory"):
        select_rank(str(model_folder), [{"text": "a"}], tmp_path / "run", settings=settings)


@pytest.mark.parametrize(("setting", "extra"), [({"workers": 2}, "workers"), ({"ray": "head:6379"}, "ray")])
def test_without_the_package_the_extra_is_named(
    setting: dict[str, Any],
    extra: str,
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rightrank.api.selecting.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'rightrank\[{extra}\]'"):
        select_rank(str(model_folder), completion_file, tmp_path / "run", settings=build_small_settings(**setting))


def test_a_worker_on_another_machine_refuses_what_differs(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    request = SelectionRequest(str(model_folder), None, completion_file, build_small_settings(ranks=(1, 4)))
    setup = replace(make_setup(tmp_path), request=request)
    for changes, kind, message in (
        ({"versions": {"torch": "1.0"}}, InputError, "but this process has 1.0; install the same version"),
        ({"folder": tmp_path / "elsewhere"}, InputError, "cannot read the run folder"),
        ({}, RunError, f"reads a different model or different data at {model_folder} and {completion_file}"),
    ):
        worker = Worker(replace(setup, **changes), "w")  # type: ignore[arg-type]
        error = worker.run_task(make_trials(1), None)
        worker.close()
        assert isinstance(error, kind)
        assert message in str(error)


class _FaultyExecutor:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        yield make_result(trials[0])
        raise self._error


def test_a_full_disk_is_one_line_a_stop_is_none_and_a_bug_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(make_setup(tmp_path), "w")
    for error, message in (
        (OSError(28, "No space left on device"), "No space left on device"),
        (InterruptedRun(), None),
    ):
        monkeypatch.setattr(worker, "_executor", _FaultyExecutor(error))
        result = worker.run_task(make_trials(2), None)
        assert (message is None and result is None) or (isinstance(result, RunError) and message in str(result))
    monkeypatch.setattr(worker, "_executor", _FaultyExecutor(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        worker.run_task(make_trials(2), None)
    worker.close()


def test_an_address_that_does_not_answer_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RunError, match=f"no Ray cluster answers at {address} within"):
        RayBackend(make_setup(tmp_path), address, 1, False, None)
    with pytest.raises(RunError, match="cannot connect to the Ray cluster at head-node: Invalid address format"):
        RayBackend(make_setup(tmp_path), "head-node", 1, False, None)


class _RayError(Exception):
    pass


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """Replace Ray by as much of it as `RayBackend` asks."""
    ray = MagicMock(exceptions=SimpleNamespace(RayError=_RayError))
    ray.nodes.return_value = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0, "memory": 2.0**33}}]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.experimental.internal_kv", ray)
    return ray


@pytest.mark.parametrize(
    ("planned", "on_cuda", "size", "reserved"),
    [
        (3 * 2**30, False, 2, {"num_cpus": 1.0, "num_gpus": 0, "memory": 3.0 * 2**30}),
        (None, False, 8, {"num_cpus": 1.0, "num_gpus": 0, "memory": None}),
        (3 * 2**30, True, 1, {"num_cpus": 1.0, "num_gpus": 1.0, "memory": None}),
    ],
)
def test_a_worker_reserves_what_the_plan_states(
    planned: int | None, on_cuda: bool, size: int, reserved: dict[str, float | None], ray: MagicMock, tmp_path: Path
) -> None:
    backend = RayBackend(make_setup(tmp_path), "auto", None, on_cuda, planned)
    assert backend.size == size
    backend.start("worker-1", 0)
    options = ray.remote.return_value.options.call_args.kwargs
    assert {name: options[name] for name in reserved} == reserved
    with pytest.raises(InputError, match=r"no node of the Ray cluster has room for a worker \(1 CPU, 64.00 GiB"):
        RayBackend(make_setup(tmp_path), "auto", None, False, 2**36)


def test_workers_of_a_cluster_get_four_variables_of_the_environment(
    ray: MagicMock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limit the inherited environment, because a Ray dashboard shows it to everyone who can reach it."""
    backend = RayBackend(make_setup(tmp_path), "auto", 1, False, None)
    secrets = {"HF_TOKEN": "hf_secret", "AWS_SECRET_ACCESS_KEY": "secret", "PYTHONPATH": "src"}
    monkeypatch.setattr(os, "environ", secrets)
    backend.start("worker-1", 0)
    assert ray.remote.return_value.options.call_args.kwargs["runtime_env"] == {"env_vars": {"PYTHONPATH": "src"}}


@pytest.mark.parametrize("how", ["another answers", "none answers for a while"])
def test_a_lost_head_ends_the_run_with_one_line(
    how: str, ray: MagicMock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = MagicMock()
    monkeypatch.setattr(workers, "_require_reachable_head", answer)
    monkeypatch.setattr(workers, "HEAD_SECONDS", 0.0)
    backend = RayBackend(make_setup(tmp_path), "head:6379", 1, False, None)
    worker = backend.start("worker-1", 0)
    backend.require_alive()
    if how == "another answers":
        ray._internal_kv_exists.side_effect = _RayError("WrongClusterID")
    else:
        answer.side_effect = RunError("no Ray cluster answers")
        backend.require_alive()  # it may come back
        monkeypatch.setattr(workers, "SILENT_SECONDS", 0.0)
    for _ in range(2):
        with pytest.raises(RunError, match="head of the Ray cluster was lost; restart the cluster and repeat the same"):
            backend.require_alive()
    worker.end(is_idle=True)
    ray.kill.assert_not_called()  # it would wait for the head
