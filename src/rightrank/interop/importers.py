"""The results of other tools as rows: Optuna, MLflow, transformers' Trainer.

Optuna and MLflow read copies of their own stores, which stay as they are. A folder of trainings gives rank, learning rate and seed
by the adapters in it, or by names such as `r2-seed0-lr5e-3`.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rightrank.data.files import UnreadableError, kind_of, read_json_object
from rightrank.data.rows import FILE_TYPES, Row, records_of_frame
from rightrank.interop.columns import settings_of_name
from rightrank.schema.errors import LIBRARY_ERRORS, MissingExtraError, ResultsError, first_line

SQLITE = b"SQLite format 3\x00"
MAX_RUNS = 50_000  # MLflow's own limit of a request
STATE = "trainer_state.json"


def import_rows(source: Path) -> list[Row] | None:
    """Rows of a path that another tool wrote; None for a plain table.

    Raises:
        MissingExtraError: the tool's library is not installed.
        ResultsError: the path can't be read, or is a folder without known results.
    """
    store, colon, study = str(source).rpartition(":")
    if kind_of(source) == "missing" and colon and _is_sqlite(Path(store)):
        return _sqlite_rows(Path(store), study)
    if kind_of(source) == "file":
        return _sqlite_rows(source) if _is_sqlite(source) else None
    if not source.is_dir():
        return None
    if states := sorted(source.rglob(STATE)):
        return _trainer_rows(source, [path.parent for path in states])
    if not any(path.suffix.lower() in FILE_TYPES for path in source.iterdir()):
        raise ResultsError(
            f"{source}: the folder holds no known results; give a run folder, trainer_state.json files, or a folder of CSV or "
            "JSONL files"
        )
    return None


def settings_from_path(folder: Path, root: Path) -> dict[str, Any]:
    """`rank`, `lr` and `seed` where known: from the nearest adapter_config.json up to `root`, then from names.

    Raises:
        ResultsError: an adapter_config.json that isn't JSON.
    """
    places = [folder, *(place for place in folder.parents if place == root or root in place.parents)]
    settings: dict[str, Any] = {}
    for place in places:
        settings = settings_of_name(place.name) | settings
    for place in places:
        paths = [place / "adapter_config.json", *sorted(place.glob("*/adapter_config.json"))]
        found = [_object(path).get("r") for path in paths if path.is_file()]
        ranks = {rank for rank in found if isinstance(rank, int)}
        if ranks:
            return settings | {"rank": ranks.pop()} if len(ranks) == 1 else settings
    return settings


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except UnreadableError as error:
        raise ResultsError(f"{path}: not JSON ({error}); restore the file, or leave its folder out") from None


def _missing(source: Path, what: str, extra: str) -> MissingExtraError:
    return MissingExtraError(f"{source}: reading {what} needs an extra: pip install 'rightrank[{extra}]'")


def _is_sqlite(source: Path) -> bool:
    if kind_of(source) != "file":
        return False
    with source.open("rb") as file:
        return file.read(len(SQLITE)) == SQLITE


def _sqlite_rows(source: Path, study: str | None = None) -> list[Row]:
    """Rows of an Optuna study or an MLflow store, from a copy: both write to every store that they open."""
    with TemporaryDirectory(prefix="rightrank-") as folder:
        copy = shutil.copyfile(source, Path(folder) / "store.db")
        try:
            with closing(sqlite3.connect(copy)) as connection:
                found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
                tables = {str(name) for (name,) in found}
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise ResultsError(f"{source}: not a readable SQLite file ({error}); restore it") from None
        if {"trials", "trial_params", "trial_values", "studies"} <= tables:
            return _optuna_rows(source, f"sqlite:///{copy}", study)
        if {"runs", "params", "metrics"} <= tables:
            return _mlflow_rows(source, f"sqlite:///{copy}")
    raise ResultsError(
        f"{source}: holds neither an Optuna study nor an MLflow store (tables: {', '.join(sorted(tables))}); give one of these"
    )


def _optuna_rows(source: Path, uri: str, name: str | None) -> list[Row]:
    """One row per trial of the study `name`, or of the only one."""
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:
        raise _missing(source, "an Optuna study", "optuna") from None
    try:
        storage = optuna.storages.RDBStorage(uri)
        try:
            names = [study.study_name for study in storage.get_all_studies()]
            chosen = names if name is None else [name]
            if len(chosen) != 1 or chosen[0] not in names:
                listed = f"{len(names)} stud{'y' if len(names) == 1 else 'ies'} ({', '.join(names) or 'none'})"
                raise ResultsError(f"{source}: {listed}; name one, such as {source.name}:{(names or ['NAME'])[0]}")
            study = optuna.load_study(study_name=chosen[0], storage=storage)
            if len(study.directions) > 1:
                raise ResultsError(
                    f"{source}: the study has {len(study.directions)} objectives; give a study with a single objective"
                )
            metric = (study.metric_names or ["value"])[0]
            frame = study.trials_dataframe(attrs=("number", "value", "params", "user_attrs", "state"))
            higher = study.directions[0].name == "MAXIMIZE"
        finally:
            storage.remove_session()
            storage.engine.dispose()
    except ResultsError:
        raise
    except (optuna.exceptions.OptunaError, SQLAlchemyError, *LIBRARY_ERRORS) as error:
        raise ResultsError(f"{source}: Optuna can't read it ({first_line(error)}); restore the file") from None
    frame = frame.rename(columns={f"value_{metric}": metric}).assign(higher_is_better=higher)
    return [
        Row({**fields, "trial": f"trial {fields['number']}"}, f"{source}: trial {fields['number']}")
        for fields in records_of_frame(frame)
    ]


def _mlflow_rows(source: Path, uri: str) -> list[Row]:
    """One row for each run, with the last value of each metric."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # reading results must not send usage data
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:
        raise _missing(source, "an MLflow store", "mlflow") from None
    try:
        client = MlflowClient(tracking_uri=uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(experiments, max_results=MAX_RUNS, order_by=["attributes.start_time ASC"])
    except (MlflowException, SQLAlchemyError, *LIBRARY_ERRORS) as error:
        raise ResultsError(f"{source}: MLflow can't read it ({first_line(error)})") from None
    found = [
        Row(
            {
                "params": run.data.params,
                "metrics": run.data.metrics,
                "trial": run.info.run_id,
                "status": run.info.status,
            },
            f"{source}: run {run.info.run_id}",
        )
        for run in runs
        if run.data.metrics
    ]
    if not found:
        raise ResultsError(f"{source}: no run of the store has a metric; log one, such as eval_loss")
    return found


def _trainer_rows(source: Path, folders: Sequence[Path]) -> list[Row]:
    """One row for each evaluation of each training, of its last checkpoint, which holds the whole history."""
    last: dict[Path, tuple[int, Path, dict[str, Any]]] = {}
    for folder in folders:
        training = folder.parent if folder.name.startswith("checkpoint-") else folder
        state = _object(folder / STATE)
        step = state.get("global_step")
        place = (step if isinstance(step, int) else 0, folder, state)
        last[training] = max(last.get(training, place), place, key=lambda one: one[:2])
    found = [
        row
        for training, (_, folder, state) in last.items()
        for row in _evaluations(folder / STATE, state, settings_from_path(folder, source), training.name)
    ]
    if not found:
        raise ResultsError(f"{source}: the {STATE} files hold no evaluation (eval_loss); train with eval_strategy set")
    return found


def _evaluations(path: Path, state: dict[str, Any], settings: dict[str, Any], training: str) -> Iterator[Row]:
    """The looks of a training; its learning rate is the highest that was logged, where no name says it."""
    log = state.get("log_history")
    entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    rates = [rate for entry in entries if isinstance(rate := entry.get("learning_rate"), int | float)]
    shared = ({"lr": max(rates)} if rates else {}) | settings | {"trial": training}
    for entry in entries:
        shared |= {"train_loss": entry["loss"]} if "loss" in entry else {}
        held_out = {name: value for name, value in entry.items() if name.startswith("eval_")}
        if held_out and isinstance(entry.get("step"), int):
            yield Row({**shared, "step": entry["step"], **held_out}, f"{path}: step {entry['step']}")
