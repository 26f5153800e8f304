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


def write_states(root: Path, losses: dict[str, list[float]], ranks: dict[str, int] | None = None) -> None:
    """Write a trainer_state.json for each folder, and the adapter's configuration where `ranks` has one."""
    for name, curve in losses.items():
        folder = root / name
        folder.mkdir(parents=True)
        history = [{"step": 50 * number, "eval_loss": loss} for number, loss in enumerate(curve, start=1)]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 50 * len(curve), "log_history": history}))
        if ranks is not None:
            (folder / "adapter_config.json").write_text(json.dumps({"r": ranks[name]}))


def test_a_trainer_state_that_ends_in_nan_has_no_result(tmp_path: Path) -> None:
    nan = float("nan")
    write_states(tmp_path, {"r4": [2.2, 2.1, 2.05], "r16": [2.1, 2.02, 2.001], "r64": [1.9, nan, nan]})
    decided = decide(tmp_path, margin=0.005)
    assert {one.rank: one.value for one in decided.decision.ranks} == {4: 2.05, 16: 2.001}
    assert "1 training without a result" in decided.understood


@pytest.mark.parametrize(
    "names",
    [
        ["deepseek-r1-lora-r4", "deepseek-r2-lora-r8"],
        ["DeepSeek-R1-Distill-Qwen-1.5B-r4", "DeepSeek-R1-Distill-Qwen-1.5B-r8"],
        ["command-r7b-r4", "command-r7b-r8"],
        ["exp-r1/lora-r4", "exp-r2/lora-r8"],
        ["r1-sweep-rank4", "r2-sweep-rank8"],
        ["rank4-round-r1", "rank8-round-r1"],
        ["deepseek-r1-rank4-lr1e-4-seed0-s100", "deepseek-r1-rank8-lr1e-4-seed0-s100"],
    ],
)
@pytest.mark.parametrize("kind", ["folders", "files", "column"])
def test_the_rank_is_not_read_from_the_model_s_name(tmp_path: Path, names: list[str], kind: str) -> None:
    losses = dict(zip(names, (2.05, 2.0), strict=True))
    if kind == "folders":
        write_states(tmp_path, {name: [loss] for name, loss in losses.items()})
    elif kind == "files":
        for name, loss in losses.items():
            (tmp_path / f"{name.replace('/', '-')}.csv").write_text(f"eval_loss\n{loss}\n")
    else:
        (tmp_path / "runs.csv").write_text("run,eval_loss\n" + "".join(f"{n},{v}\n" for n, v in losses.items()))
    decision = decide(tmp_path if kind != "column" else tmp_path / "runs.csv", margin=0.005).decision
    assert {one.rank: one.value for one in decision.ranks} == {4: 2.05, 8: 2.0}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model-r1-r4", "model-r1-r8"], "the name says rank 1 and 4; name the training so that it says one"),
        (["lora-r1-qwen-r4", "lora-r1-qwen-r8"], "the name says rank 1 and 4"),
        (["r4/r1", "r8/r1"], "the name says rank 4 and 1"),
        (["rank4-rank16", "rank8-rank16"], "the name says rank 4 and 16"),
        (["r4-lr1e-5-lr1e-3", "r8-lr1e-5-lr1e-3"], "the name says learning rate 1e-5 and 1e-3"),
        (["r4-seed1-seed2", "r8-seed1-seed2"], "the name says seed 1 and 2"),
        (["r4-s1-s200", "r8-s1-s200"], "the name says seed 1 and 200"),
    ],
)
def test_names_with_several_numbers_of_which_none_is_certain_are_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    write_states(tmp_path / "folders", {name: [2.0] for name in names})
    table = tmp_path / "runs.csv"
    table.write_text("run,eval_loss\n" + "".join(f"{name},{number}\n" for number, name in enumerate(names)))
    for source in (tmp_path / "folders", table):
        with pytest.raises(ResultsError, match=message):
            decide(source)


def test_a_recorded_rank_counts_before_names_that_say_several(tmp_path: Path) -> None:
    write_states(tmp_path, {"r1-r4": [2.05], "r1-r8": [2.0]}, ranks={"r1-r4": 4, "r1-r8": 8})
    assert [one.rank for one in decide(tmp_path, margin=0.005).decision.ranks] == [4, 8]


def test_columns_that_name_other_ranks_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    table.write_text("model,run,eval_loss\nfoo-r1,lora-r4,2.05\nfoo-r2,lora-r8,2.0\n")
    with pytest.raises(ResultsError, match="columns model and run name other ranks; give a column rank"):
        decide(table)
