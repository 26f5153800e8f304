"""MLflow tracking stores, a folder or a SQLite file, read by MLflow (extra `mlflow`).

MLflow writes to every store that it opens, so it opens a copy without the artifacts.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rightrank.errors import MissingExtraError, ResultsError, first_line
from rightrank.io.importers.example_series import series_rows
from rightrank.io.reading import LIBRARY_ERRORS
from rightrank.io.rows import Row

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

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
