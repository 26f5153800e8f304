"""Test the logged runs of trackers with the trackers' own readers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from rightrank.api.runs import decide
from rightrank.runs import trackers as registry
from rightrank.runs.folder import Journal, RunFolder
from rightrank.runs.run import Hooks, Run
from rightrank.runs.trackers import Trackers
from rightrank.schema.events import Records, read_records
from rightrank.schema.trials import TrialFinished
from tests.report.runs import write_journal
from tests.watch import Watch

pytestmark = pytest.mark.trains


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Records:
    """Write an artificial run to `run`."""
    monkeypatch.chdir(tmp_path)
    write_journal(tmp_path / "run")
    return read_records(Journal(tmp_path / "run" / "journal.jsonl").read(), "run")


def log_all(records: Records, name: str, steps: int = 0) -> list[str]:
    """Send all events to one tracker and return its warnings."""
    notices: list[str] = []
    trackers = Trackers([name])
    plan: Any = SimpleNamespace(started=records.started, steps=steps)
    trackers.on_start(Run(plan, RunFolder(Path("run")), Hooks([Watch(notice=notices.append)]), records, None))
    for outcome in records.outcomes:
        trackers.on_event(outcome)
    return notices


def list_trained_trials(records: Records) -> list[TrialFinished]:
    return [trial for trial in records.list_finished() if trial.rank > 0]


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
    assert len({run.data.tags["rightrank.group"] for run in client.search_runs([experiment.experiment_id])}) == 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_each_trial_is_a_run_with_its_numbers_by_step(
    name: str, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replace the library by one that records calls, and decide by what it was given, as by an exported table."""
    library = MagicMock()
    monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.setattr(registry, "find_spec", lambda _name: object())
    opened = [MagicMock() for _ in records.outcomes]
    library.init.side_effect = opened
    assert log_all(records, name) == []
    options = [call.kwargs for call in library.init.call_args_list]
    assert len({run_options["group"] for run_options in options}) == 1
    rows = []
    for trial in list_trained_trials(records):
        number = next(n for n, run_options in enumerate(options) if run_options["name"].endswith(trial.trial_id[:6]))
        logged = [call.args[0] for call in opened[number].log.call_args_list]
        assert [step["train/loss"] for step in logged if "train/loss" in step] == trial.train_losses
        assert logged[-1]["eval/loss"] == trial.metrics["loss"]
        assert options[number]["config"]["lora_r"] == trial.rank
        rows.append(options[number]["config"] | logged[-1])
    values = [
        {"rank": t.rank, "lr": t.learning_rate, "seed": t.seed, "value": t.value} for t in list_trained_trials(records)
    ]
    assert (
        decide(rows).decision.reference_rank
        == decide(values, higher_is_better=False, margin=0.005).decision.reference_rank
    )


@pytest.mark.parametrize("error", ["client", "network"])
def test_a_tracker_that_cannot_be_reached_stops_with_one_notice(
    error: str, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = MagicMock(Error=type("ClientError", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "wandb", library)
    monkeypatch.setattr(registry, "find_spec", lambda _name: object())
    library.init.side_effect = library.Error("no server") if error == "client" else TimeoutError("no server")
    (notice,) = log_all(records, "wandb")
    assert notice.startswith("wandb: logging stopped (")
