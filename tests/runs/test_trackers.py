"""Test the logged runs of trackers with the trackers' own readers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from rightrank.api.runs import decide
from rightrank.api.selecting import select_rank_with
from rightrank.decision.records import Records, decide_run, read_records
from rightrank.runs import trackers as registry
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import SelectionStart
from rightrank.runs.journal import Journal
from rightrank.runs.trackers import Trackers, resolve_trackers
from rightrank.schema.errors import MissingExtraError, SettingsError
from rightrank.schema.events import DecisionRecorded
from rightrank.schema.trials import TrialFinished
from rightrank.trainers.calls import TrialResult, TrialTask
from tests.commands import build_select_arguments, run
from tests.report.runs import write_journal

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
    trackers = Trackers([name], Path("run"))
    plan: Any = SimpleNamespace(started=records.started, steps=steps)
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


def test_a_longer_training_is_no_point_of_the_curve(records: Records) -> None:
    pytest.importorskip("tensorboard")
    trial = next(outcome for outcome in records.list_finished() if outcome.rank > 0 and outcome.arm.is_direct)
    records.outcomes.append(trial.model_copy(update={"trial_id": "longer", "steps": 2 * trial.steps}))
    assert log_all(records, "tensorboard", trial.steps) == []
    assert "stage/loss" in read_tensorboard_scalars(Path("run/tensorboard/stage-longer"))


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


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_each_trial_is_a_run_with_its_numbers_by_step(
    name: str, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replace the library by one that records calls, and decide by what it was given, as by an exported table."""
    library = MagicMock()
    monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.setattr(registry, "find_spec", lambda _name: object())
    opened = [MagicMock() for _ in range(len(records.outcomes) + 1)]
    for tracked in opened:
        tracked.__enter__.return_value = tracked
    library.init.side_effect = opened
    assert log_all(records, name) == []
    options = [call.kwargs for call in library.init.call_args_list]
    assert len({run_options["group"] for run_options in options}) == 1
    assert options[-1]["name"].endswith("decision")
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
    assert decide(rows).decision.reference_rank == decide(values, higher_is_better=False).decision.reference_rank


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
