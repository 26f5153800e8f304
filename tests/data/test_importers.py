"""Results as other tools keep them."""

from __future__ import annotations

import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

from rightrank.api.deciding import decide
from rightrank.schema.errors import MissingExtraError, ResultsError

LOSSES = {1: 2.3, 4: 2.001, 16: 2.0}


@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_an_mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "mlflow.db"
    client = mlflow.MlflowClient(f"sqlite:///{store}")
    experiment = client.create_experiment("lora")
    for rank, loss in (*LOSSES.items(), (8, 9.9)):
        run = client.create_run(experiment).info.run_id
        for name, value in (("lora_r", rank), ("learning_rate", 0.0001)):
            client.log_param(run, name, value)
        for step, value in ((50, loss + 0.5), (100, loss)):
            client.log_metric(run, "eval_loss", value, step=step)
        client.log_metric(run, "train_loss", float("nan"), step=60)
        client.set_terminated(run, "FAILED" if rank == 8 else "FINISHED")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = decide(store, margin=0.005).decision
    assert (found.rank, found.learning_rate) == (4, 1e-4)
    assert {evidence.rank: evidence.value for evidence in found.ranks} == LOSSES  # and none of the failed run
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("package", ["mlflow", "optuna"])
def test_without_the_library_its_extra_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    tables = {"mlflow": ("runs", "params", "metrics"), "optuna": ("studies", "trials", "trial_params", "trial_values")}
    with closing(sqlite3.connect(tmp_path / "store.db")) as base:
        base.executescript("".join(f"CREATE TABLE {name} (x INTEGER);" for name in tables[package]))
    with pytest.raises(MissingExtraError, match=rf"store\.db: .*pip install 'rightrank\[{package}\]'"):
        decide(tmp_path / "store.db")


def test_trainer_states_beside_their_adapters(tmp_path: Path) -> None:
    for rank, loss in LOSSES.items():
        for step in (50, 100):
            folder = tmp_path / f"run-{rank}" / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "peft_type": "LORA"}))
            history = [{"step": at, "eval_loss": loss + (100 - at) / 100, "epoch": 1} for at in (50, 100) if at <= step]
            history.append({"step": step, "loss": 1.0, "learning_rate": 1e-4})
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
    decision = decide(tmp_path, margin=0.005).decision
    assert decision.rank == 4
    assert {e.rank: e.value for e in decision.ranks} == LOSSES


def test_a_training_whose_folder_alone_tells_its_rank(tmp_path: Path) -> None:
    for rank, loss in LOSSES.items():
        folder = tmp_path / f"llama-lora-r{rank}-lr1e-4-seed0"
        folder.mkdir()
        state = {"global_step": 10, "log_history": [{"step": 10, "eval_loss": loss}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    decision = decide(tmp_path, margin=0.005).decision
    assert (decision.rank, decision.learning_rate) == (4, 1e-4)


def optuna_study(path: Path, directions: list[str], name: str = "lora") -> None:
    optuna = pytest.importorskip("optuna")
    ranks = optuna.distributions.CategoricalDistribution(list(LOSSES))
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    study = optuna.create_study(storage=storage, study_name=name, directions=directions)
    for rank, loss in LOSSES.items():
        trial = {"params": {"rank": rank}, "distributions": {"rank": ranks}, "values": [-loss] * len(directions)}
        study.add_trial(optuna.trial.create_trial(**trial, user_attrs={"train_loss": 1.5}))
    failed = {"params": {"rank": 1}, "distributions": {"rank": ranks}, "state": optuna.trial.TrialState.FAIL}
    study.add_trial(optuna.trial.create_trial(**failed))
    storage.remove_session()
    storage.engine.dispose()


def test_an_optuna_study(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    optuna_study(path, ["maximize"])
    before = path.read_bytes()
    path.chmod(0o400)
    found = decide(path, margin=0.005).decision
    assert (found.rank, found.higher_is_better) == (4, True)
    assert {evidence.rank: -evidence.value for evidence in found.ranks} == LOSSES
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["study.db"]


def test_optuna_studies_that_are_no_table_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    optuna_study(path, ["maximize", "minimize"])
    with pytest.raises(ResultsError, match="the study has 2 objectives; give a study with a single objective"):
        decide(path)
    optuna_study(path, ["maximize"], "other")
    with pytest.raises(ResultsError, match=r"2 studies \(lora, other\); name one, such as study.db:lora"):
        decide(path)
    assert decide(f"{path}:other", margin=0.005).decision.rank == 4
    with pytest.raises(ResultsError, match=r"2 studies \(lora, other\); name one"):
        decide(f"{path}:third")
    with closing(sqlite3.connect(path)) as base, base:
        base.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
    with pytest.raises(ResultsError, match=r"Optuna can't read it \(The runtime optuna version .* storage upgrade"):
        decide(path)


def test_an_sqlite_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    base = sqlite3.connect(path)
    base.execute("CREATE TABLE pets (name TEXT)")
    base.commit()
    base.close()
    with pytest.raises(ResultsError, match="neither an Optuna study nor an MLflow store"):
        decide(path)


def test_events_beside_checkpoints_take_the_rank_from_their_adapters(tmp_path: Path) -> None:
    from rightrank.interop.importers import settings_from_path

    for rank in (2, 8):
        checkpoint = tmp_path / f"run-{'ab'[rank == 8]}" / "checkpoint-5"
        checkpoint.mkdir(parents=True)
        (checkpoint / "adapter_config.json").write_text(json.dumps({"r": rank}))
        (checkpoint.parent / "runs" / "monday").mkdir(parents=True)
    assert settings_from_path(tmp_path / "run-a" / "runs" / "monday", tmp_path)["rank"] == 2
    assert settings_from_path(tmp_path / "run-b" / "checkpoint-5", tmp_path)["rank"] == 8


@pytest.mark.filterwarnings("ignore:.*set_metric_names")
def test_an_optuna_study_whose_metric_has_a_name(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}", direction="minimize")
    study.set_metric_names(["eval_loss"])
    for rank, loss in LOSSES.items():
        study.enqueue_trial({"rank": rank})
        study.optimize(lambda trial, loss=loss: loss + 0 * trial.suggest_int("rank", 1, 64), n_trials=1)
    decided = decide(tmp_path / "study.db", margin=0.005)
    assert (decided.decision.metric, decided.decision.rank) == ("eval_loss", 4)
