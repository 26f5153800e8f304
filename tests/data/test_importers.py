"""Results as other tools keep them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rightrank.api.runs import decide
from rightrank.schema.errors import ResultsError

LOSSES = {1: 2.3, 4: 2.001, 16: 2.0}


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


def test_events_beside_checkpoints_take_the_rank_from_their_adapters(tmp_path: Path) -> None:
    from rightrank.interop.columns import settings_from_path

    for rank in (2, 8):
        checkpoint = tmp_path / f"run-{'ab'[rank == 8]}" / "checkpoint-5"
        checkpoint.mkdir(parents=True)
        (checkpoint / "adapter_config.json").write_text(json.dumps({"r": rank}))
        (checkpoint.parent / "runs" / "monday").mkdir(parents=True)
    assert settings_from_path(tmp_path / "run-a" / "runs" / "monday", tmp_path)["rank"] == 2
    assert settings_from_path(tmp_path / "run-b" / "checkpoint-5", tmp_path)["rank"] == 8


def test_a_study_of_optuna_is_a_data_frame(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(direction="maximize")
    for rank, loss in LOSSES.items():
        study.enqueue_trial({"rank": rank})
        study.optimize(lambda trial, loss=loss: -loss + 0 * trial.suggest_int("rank", 1, 64), n_trials=1)
    frame = study.trials_dataframe()
    frame.to_csv(tmp_path / "study.csv", index=False)
    for source in (frame, tmp_path / "study.csv"):
        found = decide(source, higher_is_better=True, margin=0.005).decision
        assert (found.rank, {evidence.rank: -evidence.value for evidence in found.ranks}) == (4, LOSSES)


@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_the_runs_of_mlflow_are_a_data_frame(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.create_experiment("lora")
    for rank, loss in LOSSES.items():
        run = client.create_run(experiment).info.run_id
        client.log_param(run, "lora_r", rank)
        client.log_metric(run, "eval_loss", loss)
        client.set_terminated(run)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    try:
        assert decide(mlflow.search_runs([experiment]), margin=0.005).decision.rank == 4
    finally:
        mlflow.set_tracking_uri(before)


def test_a_database_and_mlflows_folders_are_refused_as_any_other_unknown_place(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"SQLite format 3\x00")
    with pytest.raises(ResultsError, match=r"study\.db: files of type '\.db' are not read; give a file ending in"):
        decide(tmp_path / "study.db")
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("name: lora\n")
    with pytest.raises(ResultsError, match=r"mlruns: the folder holds no known results"):
        decide(tmp_path / "mlruns")
