"""MLflow tracking stores, a folder or a SQLite file, read by MLflow (extra `mlflow`).

MLflow writes to every store that it opens, so it opens a copy without the artifacts.
"""

from __future__ import annotations

import math
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

from rightrank.data.files import LIBRARY_ERRORS, kind_of
from rightrank.data.rows import Row
from rightrank.interop.run_folders import settings_from_path
from rightrank.schema.errors import MissingExtraError, ResultsError, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from optuna.study import StudyDirection
    from optuna.trial import FrozenTrial

PREFIX = "items/"
WEIGHTS = "tokens"


def series_rows(
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
        scores = {f"eval/{name.removeprefix(PREFIX)}": values[name] for name in values if name.startswith(PREFIX)}
        plain = {name: value for name, value in values.items() if not name.startswith(PREFIX)}
        weight = scores.pop(f"eval/{WEIGHTS}", 1.0)
        for found, place, what in (
            (plain, {"step": step}, "step"),
            (scores, {"item": f"{step:06d}", "tokens": weight}, "example"),
        ):
            if found:
                fields = found if container is None else {container: found}
                yield Row({**shared, **place, **fields}, f"{where}: {what} {step}")


META = "meta.yaml"
EMPTIED = ("artifacts", "datasets", "inputs", "models", "outputs", "traces")
PAGE = 1000  # runs per request
# A file store raises an error without the first. Reading results must not send usage data.
ENVIRONMENT = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}


def recognizes(source: Path) -> bool:
    return source.is_dir() and bool(_experiments(source))


def rows(source: Path) -> list[Row]:
    """Rows of a file store (`mlruns`) or of one experiment's folder in it.

    Raises:
        MissingExtraError: MLflow is not installed.
        ResultsError: MLflow can't read the store, or no run has a metric.
    """
    with TemporaryDirectory(prefix="rightrank-") as folder:
        copy = Path(folder) / "mlruns"
        try:
            for experiment in _experiments(source):
                shutil.copytree(experiment, copy / experiment.name, ignore=_artifacts)
        except OSError as error:
            raise ResultsError(f"{source}: can't read it ({first_line(error)}); restore the store") from None
        return _rows(source, copy.as_uri())


def database_rows(source: Path) -> list[Row]:
    """Rows of a SQLite store.

    Raises:
        MissingExtraError, ResultsError: as `rows`.
    """
    with TemporaryDirectory(prefix="rightrank-") as folder:
        return _rows(source, f"sqlite:///{shutil.copy(source, folder)}")


def _experiments(source: Path) -> list[Path]:
    """The experiments' folders in a store; the folder itself where it is an experiment's."""
    for depth in ("*", "*/*"):
        runs = [path.parent for path in source.glob(f"{depth}/{META}") if (path.parent / "metrics").is_dir()]
        if runs:
            return sorted({run.parent for run in runs})
    return []


def _artifacts(folder: str, names: list[str]) -> list[str]:
    """Leave the folders of artifacts empty in the copy; MLflow requires that they exist."""
    path = Path(folder)
    return names if path.name in EMPTIED and (path.parent / META).is_file() else []


def _rows(source: Path, uri: str) -> list[Row]:
    """One row for each step at which a run logged metrics, and for each example that it scored."""
    with _environment(ENVIRONMENT):
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import SQLAlchemyError
        except ImportError:
            raise MissingExtraError(
                f"{source}: reading an MLflow store needs an extra: pip install 'rightrank[mlflow]'"
            ) from None
        try:
            client = MlflowClient(tracking_uri=uri)
            found = [row for run in _runs(client) for row in _run_rows(source, client, run)]
        except (MlflowException, SQLAlchemyError, *LIBRARY_ERRORS) as error:
            raise ResultsError(f"{source}: MLflow can't read it ({first_line(error)})") from None
    if not found:
        raise ResultsError(f"{source}: no run of the store has a metric; log one, such as eval_loss")
    return found


def _runs(client: MlflowClient) -> Iterator[Run]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    token = None
    while experiments:
        page = client.search_runs(
            experiments, max_results=PAGE, order_by=["attributes.start_time ASC"], page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def _run_rows(source: Path, client: MlflowClient, run: Run) -> Iterator[Row]:
    run_id = run.info.run_id
    steps: dict[int, dict[str, float]] = {}
    for name in run.data.metrics:
        for point in client.get_metric_history(run_id, name):
            if not math.isnan(point.value):
                steps.setdefault(point.step, {})[name] = point.value
    shared = {"params": run.data.params, "trial": run_id, "status": run.info.status}
    return series_rows(steps, shared, f"{source}: run {run_id}", container="metrics")


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


Connect: TypeAlias = Callable[[], sqlite3.Connection]


def rows_of_optuna_study(source: Path, connect: Connect) -> list[Row]:
    """One row per trial, read through `connect`, which must not allow writes.

    Raises:
        MissingExtraError: Optuna is not installed.
        ResultsError: Optuna can't read the file, or it holds several studies or objectives.
    """
    names, directions, trials = _load(source, connect)
    if len(names) != 1:
        raise ResultsError(f"{source}: {len(names)} studies ({', '.join(names) or 'none'}); give a file with one study")
    if len(directions) > 1:
        raise ResultsError(
            f"{source}: the study has {len(directions)} objectives; give a study with a single objective"
        )
    higher = directions[0].name == "MAXIMIZE"
    return [
        Row(
            {
                "user_attrs": trial.user_attrs,
                "params": trial.params,
                "value": trial.value,
                "higher_is_better": higher,
                "trial": f"trial {trial.number}",
                "status": trial.state.name,
            },
            f"{source}: trial {trial.number}",
        )
        for trial in trials
    ]


def _load(source: Path, connect: Connect) -> tuple[list[str], list[StudyDirection], list[FrozenTrial]]:
    """The names of all studies; where there is one, its directions and trials."""
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
        from sqlalchemy.pool import StaticPool
    except ImportError:
        raise MissingExtraError(
            f"{source}: reading an Optuna study needs an extra: pip install 'rightrank[optuna]'"
        ) from None
    try:
        storage = optuna.storages.RDBStorage(
            "sqlite://", {"creator": connect, "poolclass": StaticPool}, skip_table_creation=True
        )
        try:
            names = [study.study_name for study in storage.get_all_studies()]
            if len(names) != 1:
                return names, [], []
            study = optuna.load_study(study_name=names[0], storage=storage)
            return names, study.directions, study.trials
        finally:
            storage.remove_session()
            storage.engine.dispose()
    except (optuna.exceptions.OptunaError, SQLAlchemyError, *LIBRARY_ERRORS) as error:
        raise ResultsError(f"{source}: Optuna can't read it ({first_line(error)}); restore the file") from None


_HEADER = b"SQLite format 3\x00"
MAX_STEPS, CHECK_STEPS = 200_000_000, 100_000  # instructions of SQLite's virtual machine, so that no file can hang it


def recognizes_of_sqlite_store(source: Path) -> bool:
    if kind_of(source) != "file":
        return False
    with source.open("rb") as file:
        return file.read(len(_HEADER)) == _HEADER


def rows_of_sqlite_store(source: Path) -> list[Row]:
    """One row per trial (Optuna), or per run and step (MLflow).

    Raises:
        MissingExtraError: Optuna or MLflow is not installed.
        ResultsError: neither a study nor a store, or one that can't be read.
    """
    tables = _tables(source)
    if {"trials", "trial_params", "trial_values", "studies"} <= tables:
        return rows_of_optuna_study(source, partial(_connect, source))
    if {"runs", "params", "metrics"} <= tables:
        return database_rows(source)
    raise ResultsError(
        f"{source}: holds neither an Optuna study nor an MLflow store (tables: {', '.join(sorted(tables))}); give one of these"
    )


def _tables(source: Path) -> set[str]:
    try:
        connection = _connect(source)
        try:
            return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        finally:
            connection.close()
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise ResultsError(f"{source}: not a readable SQLite file ({error}); restore it") from None


def _connect(source: Path) -> sqlite3.Connection:
    """A read-only connection that stops after `MAX_STEPS` and runs no code that the file defines."""
    connection = sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    checks = iter(range(MAX_STEPS // CHECK_STEPS))
    connection.set_progress_handler(lambda: next(checks, None) is None, CHECK_STEPS)
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


PATTERN = "events.out.tfevents.*"


def recognizes_of_tensorboard_events(source: Path) -> bool:
    return source.is_dir() and next(source.rglob(PATTERN), None) is not None


def rows_of_tensorboard_events(source: Path) -> list[Row]:
    """One row for each step at which scalars were written.

    Raises:
        MissingExtraError: TensorBoard is not installed.
        ResultsError: no scalars.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise MissingExtraError(
            f"{source}: reading TensorBoard events needs an extra: pip install 'rightrank[tensorboard]'"
        ) from None
    found: list[Row] = []
    for folder in sorted({path.parent for path in source.rglob(PATTERN)}):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        settings = settings_from_path(folder, source)
        steps: dict[int, dict[str, float]] = {}
        for tag in events.Tags()["scalars"]:
            for scalar in events.Scalars(tag):
                steps.setdefault(scalar.step, {})[tag] = scalar.value
        shared = {**settings, "trial": folder.relative_to(source).as_posix()}
        found.extend(series_rows(steps, shared, str(folder)))
    if not found:
        raise ResultsError(f"{source}: the event files hold no scalars; log the held-out loss, such as eval/loss")
    return found
