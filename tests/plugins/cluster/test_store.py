"""Machines that share no disk: workers upload to a store, and the decision is the same."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rightrank import select_rank
from rightrank.plugins import cluster
from rightrank.plugins.cluster.store import Store, run_store
from rightrank.plugins.cluster.worker import Setup, Stop, Task, Worker, WorkerLost, WorkerMessage
from rightrank.runs.folder import RunFolder
from rightrank.schema.errors import MissingExtraError, RunError, SettingsError
from rightrank.schema.settings import SelectSettings
from tests.plugins.cluster.runs import decision_of, values_of
from tests.tiny import small_settings

SECRET = "not-to-be-seen-anywhere"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A local S3 server on the loopback interface."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    try:
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket/runs"
    finally:
        server.stop()


@pytest.fixture
def share(tmp_path: Path) -> str:
    return f"file://{tmp_path}/share/runs"


class InProcessCrew:
    """Real workers in this process, one after the other, each with its own folder and base, as on two machines."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._workers: dict[str, Worker] = {}
        self._sent: list[tuple[str, WorkerMessage | WorkerLost]] = []

    def start(self, worker: str) -> None:
        self._workers[worker] = Worker(lambda message: self._sent.append((worker, message)))
        self._workers[worker].receive(self._setup.model_dump_json())

    def send(self, worker: str, command: Task | Stop) -> None:
        if isinstance(command, Task):
            self._workers[worker].run_task(command)

    def end(self, worker: str) -> None:
        self._workers.pop(worker).close()

    def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]:
        sent, self._sent = self._sent, []
        return sent

    def close(self) -> None:
        for worker in list(self._workers):
            self.end(worker)


@pytest.mark.filterwarnings("ignore")  # the server's own
@pytest.mark.parametrize(("strategy", "kind"), [("bracket", "bucket"), ("grid", "share")])
def test_the_decision_is_that_of_one_process(
    strategy: str,
    kind: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(cluster, "_crew", lambda settings, setup, *_: (InProcessCrew(setup), settings.workers))
    address = request.getfixturevalue(kind)
    how: dict[str, Any] = {"strategy": strategy, "ranks": (1, 2, 4), "learning_rates": (3e-3, 1e-2), "max_steps": 6}
    how["checkpoint_seconds"] = 0.01
    select_rank(str(model_folder), completion_file, tmp_path / "alone", settings=small_settings(**how))
    settings = small_settings(**how, executor="processes", workers=2, store=address)
    run = tmp_path / "run"
    selected = select_rank(str(model_folder), completion_file, run, settings=settings)
    assert decision_of(run) == decision_of(tmp_path / "alone")
    assert values_of(run) == values_of(tmp_path / "alone")
    assert selected.adapter is not None
    ours, theirs = (folder / "adapter" / "adapter_model.safetensors" for folder in (run, tmp_path / "alone"))
    assert ours.read_bytes() == theirs.read_bytes()
    # The driver downloads only what it needs; the store keeps the adapters and no checkpoints.
    fingerprint = RunFolder(run).journal.read()[0].fingerprint  # type: ignore[union-attr]
    files = run_store(address, fingerprint)._files.find(f"{address.partition('://')[2]}/{fingerprint}")
    kept = {path.rpartition(f"{fingerprint}/")[2].split("/")[0] for path in files}
    assert kept == {"trials"}
    downloaded = {path.name for path in (run / "trials").iterdir()}
    assert 1 <= len(downloaded) <= 2
    assert len({path.split("/")[-2] for path in files}) > len(downloaded)
    texts = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in text for text in texts)


def test_a_store_keeps_files_and_folders(share: str, tmp_path: Path) -> None:
    store = Store(share)
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (tmp_path / "file").write_text("first")
    store.put(folder, "trials/a")
    store.put(tmp_path / "file", "checkpoints/a")
    (tmp_path / "file").write_text("second")
    store.put(tmp_path / "file", "checkpoints/a")
    assert store.get("trials/a", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_text() == "{}"
    assert store.get("checkpoints/a", tmp_path / "file-back")
    assert (tmp_path / "file-back").read_text() == "second"
    assert not store.get("trials/b", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    store.remove("checkpoints")
    store.remove("checkpoints")
    assert not store.get("checkpoints/a", tmp_path / "nothing")


def test_a_store_that_fails_for_a_while_is_waited_for(
    share: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("first")
    waited: list[float] = []
    monkeypatch.setattr("rightrank.plugins.cluster.store.time.sleep", waited.append)
    for patience, error in ((0.0, OSError("503")), (60.0, PermissionError("403"))):
        store = Store(share, patience)
        monkeypatch.setattr(store._files, "put_file", raising([error]))
        with pytest.raises(RunError, match=r"can't write a to the store .*: 503|403"):
            store.put(tmp_path / "file", "a")
        assert not waited
    monkeypatch.undo()
    monkeypatch.setattr("rightrank.plugins.cluster.store.time.sleep", waited.append)
    store = Store(share, 60.0)
    monkeypatch.setattr(store._files, "put_file", raising([OSError("503")] * 3, store._files.put_file))
    store.put(tmp_path / "file", "a")
    assert waited == [0.5, 1.0, 2.0]
    assert store.get("a", tmp_path / "back")
    monkeypatch.setattr(store._files, "get_file", raising([FileNotFoundError("removed by another run")]))
    assert not store.get("a", tmp_path / "again")


def raising(errors: list[OSError], then: Any = None) -> Any:
    """A call that fails so often, then does the real thing."""

    def call(*arguments: Any) -> Any:
        if errors:
            raise errors.pop()
        return then(*arguments)

    return call


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://runs", "is not an address that several machines can reach"),
        ("/shared/runs", "is not an address that several machines can reach"),
        ("s3://", "is not an address that several machines can reach"),
        ("s3://key:secret@bucket/runs", "credentials through the environment"),
        ("simplecache::s3://bucket", "or chained protocols is refused"),
    ],
)
def test_invalid_addresses_are_one_line(address: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        SelectSettings(executor="processes", workers=2, store=address)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_store_is_for_workers() -> None:
    with pytest.raises(SettingsError, match="store was given and the executor is 'local'"):
        SelectSettings(store="s3://bucket/runs")


def test_a_store_without_its_package_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingExtraError, match=r"install gcsfs .*pip install 'rightrank\[store\]'"):
        Store("gs://bucket/runs")
    with pytest.raises(RunError, match=r"can't open the store nothing://x: Protocol not known: nothing"):
        Store("nothing://x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_store_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can't write a to the store"):
        Store(f"file://{tmp_path}/locked/runs").put(tmp_path / "file", "a")


def test_a_missing_store_ends_the_run_before_it_starts(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "share").write_text("a file where a folder should be")
    settings = small_settings(executor="processes", workers=1, store=f"file://{tmp_path}/share/runs")
    with pytest.raises(RunError, match=r"can't write reachable to the store file://.*"):
        select_rank(str(model_folder), completion_file, tmp_path / "run", settings=settings)
