"""The results of other tools as rows: Optuna, MLflow, Ray Tune, transformers' Trainer, TensorBoard.

Each tool's library reads its own stores, which stay as they are. A folder of trainings gives rank, learning rate and seed by
the adapters in it, or by names such as `r2-seed0-lr5e-3`.
"""

from __future__ import annotations

import math
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rightrank.data.files import (
    LIBRARY_ERRORS,
    UnreadableError,
    kind_of,
    parse_json,
    read_json_object,
    read_text,
)
from rightrank.data.rows import FILE_TYPES, Row, read_rows, records_of_frame
from rightrank.interop.columns import settings_of_name
from rightrank.schema.errors import DataError, MissingExtraError, ResultsError, first_line

SCORES, WEIGHTS = "items/", "tokens"  # series whose steps are the numbers of examples
SQLITE = b"SQLite format 3\x00"
MAX_STEPS, CHECK_STEPS = 200_000_000, 100_000  # instructions of SQLite's virtual machine, so that no file can hang it
META = "meta.yaml"
EMPTIED = ("artifacts", "datasets", "inputs", "models", "outputs", "traces")
PAGE = 1000  # runs per request
# A file store of MLflow raises an error without the first. Reading results must not send usage data.
ENVIRONMENT = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
EVENTS, STATE = "events.out.tfevents.*", "trainer_state.json"
MAX_DEPTH = 4
MAX_REPORT_BYTES = 2**28  # of one trial of Ray Tune
# Fields that Ray adds to every report.
HOUSEKEEPING = {"pid", "hostname", "node_ip", "date", "timestamp", "trial_id", "done", "config"}


def import_rows(source: Path) -> list[Row] | None:
    """Rows of a path that another tool wrote; None for a plain table.

    Raises:
        MissingExtraError: the tool's library is not installed.
        ResultsError: the path can't be read, or is a folder without known results.
    """
    store, colon, study = str(source).rpartition(":")
    if kind_of(source) == "missing" and colon and _is_sqlite(Path(store)):
        return _optuna_rows(Path(store), study)
    if kind_of(source) == "file":
        return _sqlite_rows(source) if _is_sqlite(source) else None
    if not source.is_dir():
        return None
    for found, read in (
        (_experiments(source), _mlflow_folder_rows),
        (_below(source, "params.json"), _ray_rows),
        (_below(source, STATE), _trainer_rows),
        (sorted({path.parent for path in source.rglob(EVENTS)}), _tensorboard_rows),
    ):
        if found:
            return read(source, found)
    if not any(path.suffix.lower() in FILE_TYPES for path in source.iterdir()):
        raise ResultsError(
            f"{source}: the folder holds no known results; give a run folder, an mlruns store, Ray Tune results, "
            "TensorBoard events, trainer_state.json files, or a folder of CSV or JSONL files"
        )
    return None


def _below(source: Path, name: str) -> list[Path]:
    """The folders at most `MAX_DEPTH` deep that hold a file of this name; those of Ray Tune hold reports too."""
    patterns = ("/".join(["*"] * depth + [name]) for depth in range(MAX_DEPTH))
    folders = sorted(path.parent for pattern in patterns for path in source.glob(pattern))
    reports = ("result.json", "progress.csv")
    return [one for one in folders if name == STATE or any((one / report).exists() for report in reports)]


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
        ranks = [_object(path).get("r") for path in paths if path.is_file()]
        if ranks:
            agreed = isinstance(ranks[0], int) and ranks.count(ranks[0]) == len(ranks)
            return settings | {"rank": ranks[0]} if agreed else settings
    return settings


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except UnreadableError as error:
        raise ResultsError(f"{path}: not JSON ({error}); restore the file, or leave its folder out") from None


def _series_rows(
    steps: Mapping[int, Mapping[str, Any]], shared: Mapping[str, Any], where: str, container: str | None = None
) -> Iterator[Row]:
    """Yield a row for each step of a training, and for each example that it scored.

    Args:
        steps: step → name → value; of the series `items/NAME`, the step is the example's number.
        shared: the fields that all rows of the training have.
        where: the training's name in error messages.
        container: the field that holds the values; None: the values are fields of the row.
    """
    for step, values in sorted(steps.items()):
        scores = {f"eval/{name.removeprefix(SCORES)}": values[name] for name in values if name.startswith(SCORES)}
        others = {name: value for name, value in values.items() if not name.startswith(SCORES)}
        weight = scores.pop(f"eval/{WEIGHTS}", 1.0)
        for found, place, what in (
            (others, {"step": step}, "step"),
            (scores, {"item": f"{step:06d}", "tokens": weight}, "example"),
        ):
            if found:
                fields = found if container is None else {container: found}
                yield Row({**shared, **place, **fields}, f"{where}: {what} {step}")


def _missing(source: Path, what: str, extra: str) -> MissingExtraError:
    return MissingExtraError(f"{source}: reading {what} needs an extra: pip install 'rightrank[{extra}]'")


def _is_sqlite(source: Path) -> bool:
    if kind_of(source) != "file":
        return False
    with source.open("rb") as file:
        return file.read(len(SQLITE)) == SQLITE


def _sqlite_rows(source: Path) -> list[Row]:
    """Rows of an Optuna study or an MLflow store."""
    try:
        with closing(_connect(source)) as connection:
            found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            tables = {name for (name,) in found}
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise ResultsError(f"{source}: not a readable SQLite file ({error}); restore it") from None
    if {"trials", "trial_params", "trial_values", "studies"} <= tables:
        return _optuna_rows(source)
    if {"runs", "params", "metrics"} <= tables:
        with TemporaryDirectory(prefix="rightrank-") as folder:  # MLflow writes to every store that it opens
            return _mlflow_rows(source, f"sqlite:///{shutil.copy(source, folder)}")
    raise ResultsError(
        f"{source}: holds neither an Optuna study nor an MLflow store (tables: {', '.join(sorted(tables))}); give one of these"
    )


def _connect(source: Path) -> sqlite3.Connection:
    """A read-only connection that stops after `MAX_STEPS` and runs no code that the file defines."""
    connection = sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    checks = iter(range(MAX_STEPS // CHECK_STEPS))
    connection.set_progress_handler(lambda: next(checks, None) is None, CHECK_STEPS)
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


def _optuna_rows(source: Path, name: str | None = None) -> list[Row]:
    """One row per trial of the study `name`, or of the only one."""
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
        from sqlalchemy.pool import StaticPool
    except ImportError:
        raise _missing(source, "an Optuna study", "optuna") from None
    engine = {"creator": partial(_connect, source), "poolclass": StaticPool}
    try:
        storage = optuna.storages.RDBStorage("sqlite://", engine, skip_table_creation=True)
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


def _experiments(source: Path) -> list[Path]:
    """The experiments' folders in an MLflow store; the folder itself where it is an experiment's."""
    for depth in ("*", "*/*"):
        runs = [path.parent for path in source.glob(f"{depth}/{META}") if (path.parent / "metrics").is_dir()]
        if runs:
            return sorted({run.parent for run in runs})
    return []


def _mlflow_folder_rows(source: Path, experiments: Sequence[Path]) -> list[Row]:
    """Rows of a file store, of which MLflow reads a copy without the artifacts: it writes to every store that it opens."""

    def artifacts(folder: str, names: list[str]) -> list[str]:
        path = Path(folder)  # MLflow requires that the folders exist
        return names if path.name in EMPTIED and (path.parent / META).is_file() else []

    with TemporaryDirectory(prefix="rightrank-") as folder:
        copy = Path(folder) / "mlruns"
        try:
            for experiment in experiments:
                shutil.copytree(experiment, copy / experiment.name, ignore=artifacts)
        except OSError as error:
            raise ResultsError(f"{source}: can't read it ({first_line(error)}); restore the store") from None
        return _mlflow_rows(source, copy.as_uri())


def _mlflow_rows(source: Path, uri: str) -> list[Row]:
    """One row for each step at which a run logged metrics, and for each example that it scored."""
    with _environment(ENVIRONMENT):
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import SQLAlchemyError
        except ImportError:
            raise _missing(source, "an MLflow store", "mlflow") from None
        try:
            client = MlflowClient(tracking_uri=uri)
            found = [row for run in _mlflow_runs(client) for row in _mlflow_run_rows(source, client, run)]
        except (MlflowException, SQLAlchemyError, *LIBRARY_ERRORS) as error:
            raise ResultsError(f"{source}: MLflow can't read it ({first_line(error)})") from None
    if not found:
        raise ResultsError(f"{source}: no run of the store has a metric; log one, such as eval_loss")
    return found


def _mlflow_runs(client: Any) -> Iterator[Any]:
    experiments, token = [experiment.experiment_id for experiment in client.search_experiments()], None
    while experiments:
        page = client.search_runs(
            experiments, max_results=PAGE, order_by=["attributes.start_time ASC"], page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def _mlflow_run_rows(source: Path, client: Any, run: Any) -> Iterator[Row]:
    """The whole history of each metric; `mlflow.search_runs` gives the last value of each."""
    run_id = run.info.run_id
    steps: dict[int, dict[str, float]] = {}
    for name in run.data.metrics:
        for point in client.get_metric_history(run_id, name):
            if not math.isnan(point.value):
                steps.setdefault(point.step, {})[name] = point.value
    shared = {"params": run.data.params, "trial": run_id, "status": run.info.status}
    return _series_rows(steps, shared, f"{source}: run {run_id}", container="metrics")


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that the user has not set, for the duration of the block."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _ray_rows(source: Path, trials: Sequence[Path]) -> list[Row]:
    """One row per report, with the trial's parameters."""
    found: list[Row] = []
    for trial in trials:
        parameters = _object(trial / "params.json")
        for report in _reports(trial):
            values = {name: value for name, value in report.fields.items() if name not in HOUSEKEEPING}
            found.append(Row({"config": parameters, **values, "trial": trial.name}, report.where))
    if not found:
        raise ResultsError(f"{source}: the trials reported nothing (empty result.json files)")
    return found


def _reports(trial: Path) -> list[Row]:
    """Those of `result.json`, whose last line may be cut off; else of `progress.csv`."""
    path, table = trial / "result.json", trial / "progress.csv"
    if not path.exists() or path.stat().st_size == 0:
        if not table.exists() or table.stat().st_size == 0:
            return []
        try:
            return [row for rows in read_rows(table).values() for row in rows]
        except DataError as error:
            raise ResultsError(str(error)) from None
    try:
        lines = read_text(path, MAX_REPORT_BYTES).splitlines()
    except UnreadableError as error:
        raise ResultsError(f"{path}: can't read it ({error}); restore the file, or leave its trial out") from None
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            report = parse_json(line)
        except UnreadableError:
            raise ResultsError(f"{path}:{number}: not JSON; remove the line if the trial was interrupted") from None
        if isinstance(report, dict):
            found.append(Row(report, f"{path}:{number}"))
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


def _evaluations(path: Path, state: dict[str, Any], settings: dict[str, Any], training: str) -> list[Row]:
    log = state.get("log_history")
    entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    history = [entry for entry in entries if isinstance(entry.get("step"), int)]
    rates = {one["step"]: one["learning_rate"] for one in history if isinstance(one.get("learning_rate"), int | float)}
    if rates and "lr" not in settings:
        settings["lr"] = _rate_as_set(rates, state.get("max_steps"))
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    found: list[Row] = []
    for entry in history:
        held_out = {name: value for name, value in entry.items() if name.startswith("eval_")}
        if held_out:
            before = [loss for step, loss in losses.items() if step <= entry["step"]]
            trained = {"train_loss": before[-1]} if before else {}
            fields = {**settings, **trained, "trial": training, "step": entry["step"], **held_out}
            found.append(Row(fields, f"{path}: step {entry['step']}"))
    return found


def _rate_as_set(rates: Mapping[int, float], max_steps: Any) -> float:
    """The learning rate that was set, from those that were logged along a linear or cosine schedule without warmup.

    Trainers log it before or after the scheduler's step. Where no schedule fits all of them, the highest that was logged.
    """
    highest = max(rates.values())
    if not isinstance(max_steps, int) or len(rates) < 2 or min(rates.values()) == highest:
        return highest
    for shape in (lambda part: 1 - part, lambda part: (1 + math.cos(math.pi * part)) / 2):
        for before in (0, 1):
            shares = {step: shape((step - before) / max_steps) for step in rates}
            starts = [rate / shares[step] for step, rate in rates.items() if shares[step] > 1e-6]
            if starts and max(starts) - min(starts) < 1e-3 * highest:
                return float(f"{starts[0]:.4g}")
    return highest


def _tensorboard_rows(source: Path, folders: Sequence[Path]) -> list[Row]:
    """One row for each step at which scalars were written."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise _missing(source, "TensorBoard events", "tensorboard") from None
    found: list[Row] = []
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        steps: dict[int, dict[str, float]] = {}
        for tag in events.Tags()["scalars"]:
            for scalar in events.Scalars(tag):
                steps.setdefault(scalar.step, {})[tag] = scalar.value
        shared = {**settings_from_path(folder, source), "trial": folder.relative_to(source).as_posix()}
        found.extend(_series_rows(steps, shared, str(folder)))
    if not found:
        raise ResultsError(f"{source}: the event files hold no scalars; log the held-out loss, such as eval/loss")
    return found
