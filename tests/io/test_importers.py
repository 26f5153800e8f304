"""Results as other tools keep them."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from rightrank.api import decide
from rightrank.errors import ResultsError

LOSSES = {1: 2.3, 4: 2.001, 16: 2.0}


def test_a_local_mlflow_store(tmp_path: Path) -> None:
    for rank, loss in LOSSES.items():
        run = tmp_path / "mlruns" / "0" / f"run{rank}"
        for folder in ("params", "metrics", "tags"):
            (run / folder).mkdir(parents=True)
        (run / "meta.yaml").write_text("run_id: x\n")
        (run / "params" / "lora_r").write_text(str(rank))
        (run / "params" / "learning_rate").write_text("0.0001")
        (run / "metrics" / "eval_loss").write_text(f"1 {loss + 0.5} 50\n2 {loss} 100\n")
        (run / "metrics" / "train_loss").write_text("1 1.5 60\n")
    decision = decide(tmp_path / "mlruns", margin=0.005).decision
    assert decision.rank == 4
    assert decision.learning_rate == 1e-4


def test_ray_tune_results(tmp_path: Path) -> None:
    for rank, loss in LOSSES.items():
        trial = tmp_path / "train_2026" / f"train_{rank}"
        trial.mkdir(parents=True)
        (trial / "params.json").write_text(json.dumps({"lora_r": rank, "lr": 1e-4}))
        reports = [{"eval_loss": loss + 1 / n, "training_iteration": n, "config": {"lora_r": 99}} for n in (1, 2)]
        reports.append({"eval_loss": loss, "training_iteration": 3, "time_total_s": 12.5})
        (trial / "result.json").write_text("".join(json.dumps(report) + "\n" for report in reports))
    decision = decide(tmp_path / "train_2026", margin=0.005).decision
    assert decision.rank == 4
    assert decision.ranks[0].value == 2.3


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


def test_an_optuna_study(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    with sqlite3.connect(path) as base:
        base.executescript(
            """
            CREATE TABLE studies (study_id INTEGER, study_name TEXT);
            CREATE TABLE study_directions (study_id INTEGER, direction TEXT, objective INTEGER);
            CREATE TABLE trials (trial_id INTEGER, number INTEGER, study_id INTEGER, state TEXT);
            CREATE TABLE trial_params (trial_id INTEGER, param_name TEXT, param_value REAL, distribution_json TEXT);
            CREATE TABLE trial_values (trial_id INTEGER, objective INTEGER, value REAL);
            CREATE TABLE trial_user_attributes (trial_id INTEGER, key TEXT, value_json TEXT);
            INSERT INTO studies VALUES (1, 'lora');
            INSERT INTO study_directions VALUES (1, 'MAXIMIZE', 0);
            """
        )
        choices = json.dumps({"name": "CategoricalDistribution", "attributes": {"choices": list(LOSSES)}})
        for number, loss in enumerate(LOSSES.values()):
            base.execute("INSERT INTO trials VALUES (?, ?, 1, 'COMPLETE')", (number, number))
            base.execute("INSERT INTO trial_params VALUES (?, 'rank', ?, ?)", (number, float(number), choices))
            base.execute("INSERT INTO trial_values VALUES (?, 0, ?)", (number, -loss))
        base.execute("INSERT INTO trials VALUES (3, 3, 1, 'FAIL')")
        base.execute("INSERT INTO trial_params VALUES (3, 'rank', 0, ?)", (choices,))
    base.close()
    decision = decide(path, margin=0.005).decision
    assert (decision.rank, decision.higher_is_better) == (4, True)


def test_an_sqlite_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    base = sqlite3.connect(path)
    base.execute("CREATE TABLE pets (name TEXT)")
    base.commit()
    base.close()
    with pytest.raises(ResultsError, match="neither an Optuna study nor an MLflow store"):
        decide(path)


def test_events_beside_checkpoints_take_the_rank_from_their_adapters(tmp_path: Path) -> None:
    from rightrank.io.importers.path_settings import settings_from_path

    for rank in (2, 8):
        checkpoint = tmp_path / f"run-{'ab'[rank == 8]}" / "checkpoint-5"
        checkpoint.mkdir(parents=True)
        (checkpoint / "adapter_config.json").write_text(json.dumps({"r": rank}))
        (checkpoint.parent / "runs" / "monday").mkdir(parents=True)
    assert settings_from_path(tmp_path / "run-a" / "runs" / "monday", tmp_path)["rank"] == 2
    assert settings_from_path(tmp_path / "run-b" / "checkpoint-5", tmp_path)["rank"] == 8


def test_tensorboard_events(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    for rank, loss in LOSSES.items():
        writer = tensorboard.EventFileWriter(str(tmp_path / f"rank_{rank}"))
        for step, value in ((50, loss + 0.5), (100, loss)):
            summary = Summary(value=[Summary.Value(tag="eval/loss", simple_value=value)])
            writer.add_event(Event(step=step, wall_time=1.0, summary=summary))
        writer.close()
    decision = decide(tmp_path, margin=0.005).decision
    assert decision.rank == 4
    assert decision.ranks[0].value == pytest.approx(2.3)
