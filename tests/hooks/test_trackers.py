"""Test the logged runs of trackers with the trackers' own readers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rightrank.api.runs import decide
from rightrank.api.selecting import select_rank_with
from rightrank.decision.records import Records, decide_run, read_records
from rightrank.hooks import trackers as registry
from rightrank.hooks.trackers import Trackers, resolve_trackers
from rightrank.runs.calls import TrialResult, TrialTask
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import SelectionStart
from rightrank.runs.journal import Journal
from rightrank.schema.errors import MissingExtraError, SettingsError
from rightrank.schema.events import DecisionRecorded
from rightrank.schema.trials import TrialFinished
from tests.commands import build_select_arguments, run
from tests.report.runs import write_journal

pytestmark = pytest.mark.trains


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Records:
    """Write an artificial run to `run`."""
    monkeypatch.chdir(tmp_path)
    write_journal(tmp_path / "run")
    return read_records(Journal(tmp_path / "run" / "journal.jsonl").read(), "run")


def log_all(records: Records, name: str) -> list[str]:
    """Send all events to one tracker and return its warnings."""
    notices: list[str] = []
    trackers = Trackers([name], Path("run"))
    plan: Any = SimpleNamespace(started=records.started)
    trackers.on_start(
        SelectionStart(plan, RunFolder(Path("run")), records.copy, lambda event: notices.append(event.text))
    )  # type: ignore[union-attr]
    for outcome in records.outcomes:
        trackers.on_event(outcome)
    trackers.on_event(DecisionRecorded(decision=decide_run(records), adapter_trial_id=None))
    return notices


def list_trained_trials(records: Records) -> list[TrialFinished]:
    return [trial for trial in records.list_finished() if trial.rank > 0]


def read_tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values of each tag, as read by TensorBoard."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(scalar.step, scalar.value) for scalar in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard(records: Records) -> None:
    pytest.importorskip("tensorboard")
    assert log_all(records, "tensorboard") == []
    assert len(list(Path("run/tensorboard").iterdir())) == len(records.outcomes) + 1
    trial = next(outcome for outcome in records.list_finished() if outcome.rank > 0 and outcome.arm.is_direct)
    (folder,) = Path("run/tensorboard").glob(f"*{trial.trial_id[:6]}")
    scalars = read_tensorboard_scalars(folder)
    assert [value for _, value in scalars["train/loss"]] == pytest.approx(trial.train_losses)
    assert scalars["eval/loss"][-1] == (trial.steps, pytest.approx(trial.metrics["loss"]))


@pytest.mark.filterwarnings("ignore")  # warnings of MLflow
def test_mlflow(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    assert log_all(records, "mlflow") == []
    values = [
        {"rank": t.rank, "lr": t.learning_rate, "seed": t.seed, "value": t.value} for t in list_trained_trials(records)
    ]
    ours = decide(values, higher_is_better=False).decision
    assert decide(mlflow.search_runs(experiment_names=["rightrank"])).decision.reference_rank == ours.reference_rank
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("rightrank")
    runs = client.search_runs([experiment.experiment_id], "tags.`rightrank.trial_id` = 'decision'")
    assert runs[0].data.tags["decision/verdict"] == decide_run(records).verdict
    assert len({run.data.tags["rightrank.group"] for run in client.search_runs([experiment.experiment_id])}) == 1


@pytest.mark.filterwarnings("ignore")  # warnings of W&B
def test_wandb_offline(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that W&B's reader of an offline run returns the logged values, and that an exported table gives the same rank."""
    pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", "."), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    assert log_all(records, "wandb") == []
    runs = [_read_wandb_run(path) for path in sorted(Path("wandb").glob("offline-run-*/*.wandb"))]
    assert len(runs) == len(records.outcomes) + 1
    assert {run["group"] for run in runs} == {runs[0]["group"]}
    last = next(run for run in runs if run["name"] == "decision")
    assert last["summary"]["decision/verdict"] == decide_run(records).verdict
    trained = list_trained_trials(records)
    by_name = {run["name"]: run for run in runs}
    for trial in trained:
        run = next(run for name, run in by_name.items() if name.endswith(trial.trial_id[:6]))
        assert run["summary"]["eval/loss"] == trial.metrics["loss"]
        assert [step["train/loss"] for step in run["history"] if "train/loss" in step] == trial.train_losses
        assert run["config"]["lora_r"] == trial.rank
    exported = [{"name": run["name"], **run["config"], **run["summary"]} for run in runs]
    Path("export.json").write_text(json.dumps(exported))
    values = [{"rank": t.rank, "lr": t.learning_rate, "seed": t.seed, "value": t.value} for t in trained]
    assert decide(Path("export.json")).decision.reference_rank == decide(values).decision.reference_rank


def _read_wandb_run(path: Path) -> dict[str, Any]:
    """Read the records of a W&B run file, which are framed like LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    run_fields: dict[str, Any] = {"config": {}, "summary": {}, "history": []}
    for data in _read_frames(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_fields |= {"name": record.run.display_name, "group": record.run.run_group}
            run_fields["config"] |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
        elif kind == "config":
            run_fields["config"] |= {i.key: json.loads(i.value_json) for i in record.config.update}
        elif kind == "history":
            run_fields["history"].append({_get_key(i): json.loads(i.value_json) for i in record.history.item})
        elif kind == "summary":
            run_fields["summary"] |= {_get_key(i): json.loads(i.value_json) for i in record.summary.update}
    return run_fields


def _read_frames(content: bytes) -> Iterator[bytes]:
    """Yield the records of a W&B file.

    After a header of 7 bytes come chunks of checksum (4), length (2) and kind (1: complete, 2 to 4: first to last section).
    """
    offset, chunks = 7, b""
    while offset + 7 <= len(content):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768  # the rest of the block is too short for a header
            continue
        length, kind = int.from_bytes(content[offset + 4 : offset + 6], "little"), content[offset + 6]
        chunks += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):
            yield chunks
            chunks = b""


def _get_key(example: Any) -> str:
    return example.key or ".".join(example.nested_key)


@pytest.mark.filterwarnings("ignore")  # warnings of Trackio
def test_trackio(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(Path("trackio").resolve()))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    assert log_all(records, "trackio") == []
    for trial in records.list_finished():
        runs = [name for name in SQLiteStorage.get_runs("rightrank") if name.endswith(trial.trial_id[:6])]
        logged = SQLiteStorage.get_logs("rightrank", runs[0])
        assert [row["train/loss"] for row in logged if "train/loss" in row] == trial.train_losses
        assert logged[-1]["eval/loss"] == pytest.approx(trial.metrics["loss"])


def test_each_trial_is_logged_once_and_a_failing_tracker_ends_nothing(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    fails_at = 2

    def write(run: Any, _folder: Path) -> None:
        if len(written) == fails_at:
            raise ConnectionError("no\nroute")
        written.append(run.key)

    monkeypatch.setattr(registry, "find_spec", lambda _name: object())
    monkeypatch.setitem(registry._WRITERS, "wandb", write)
    notices = log_all(records, "wandb")
    assert len(written) == 2
    assert notices == ["wandb: logging stopped (ConnectionError: no route); run again to log the missing trials"]
    fails_at = -1
    assert log_all(records, "wandb") == []
    assert sorted(written) == sorted(["decision", *(outcome.trial_id for outcome in records.outcomes)])


def test_unknown_and_missing_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="did you mean 'wandb'"):
        resolve_trackers(["wanb"])
    monkeypatch.setattr(registry, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"rightrank\[mlflow\]"):
        resolve_trackers(["mlflow"])
    assert resolve_trackers(["none"]) == ()
    assert resolve_trackers(["all"]) == ()


def test_a_custom_trainer_reports_to_trackers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")

    def train(task: TrialTask) -> TrialResult:
        scores = [task.rank / (task.rank + 1 + example % 3) for example in range(50)]
        return TrialResult(metrics={"reward": sum(scores) / 50}, example_scores=scores)

    out = tmp_path / "own"
    settings = {"ranks": (1, 4, 16), "learning_rates": (1e-3,), "metric": "reward", "margin": 0.01}
    selected = select_rank_with(train, out, **settings, callbacks=[Trackers(["tensorboard"], out)])  # type: ignore[arg-type]
    assert len(selected.decision.ranks) == 3
    rewards = [read_tensorboard_scalars(folder)["eval/reward"] for folder in (out / "tensorboard").glob("r*")]
    assert len(rewards) >= 3


def test_a_resumed_selection_reports_nothing_twice(
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    command = build_select_arguments(model_folder, completion_file, tmp_path / "out", "--report-to", "tensorboard")
    status, _, err = run([*command, "--json", "--quiet"], capsys)
    assert status == 0, err
    files_before = sorted(path.name for path in (tmp_path / "out" / "tensorboard").rglob("events*"))
    status, _, err = run([*command, "--json", "--quiet"], capsys)
    assert status == 0, err
    assert sorted(path.name for path in (tmp_path / "out" / "tensorboard").rglob("events*")) == files_before
