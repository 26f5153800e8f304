"""Importers: turn the results of other tools into rows. Each importer recognizes its own kind of path."""

from __future__ import annotations

from pathlib import Path

from rightrank.errors import ResultsError
from rightrank.io.importers import mlflow_store, ray_tune, sqlite_store, tensorboard_events, trainer_state
from rightrank.io.rows import FILE_TYPES, Row

# (recognizes, rows) of each importer. The first that recognizes a path reads it.
IMPORTERS = (
    (sqlite_store.recognizes, sqlite_store.rows),
    (mlflow_store.recognizes, mlflow_store.rows),
    (ray_tune.recognizes, ray_tune.rows),
    (trainer_state.recognizes, trainer_state.rows),
    (tensorboard_events.recognizes, tensorboard_events.rows),
)


def import_rows(source: Path) -> list[Row] | None:
    """Rows of a path that an importer recognizes; None for a plain table.

    Raises:
        MissingExtraError: the importer's library is not installed.
        ResultsError: the importer can't read the path, or a folder without known results.
    """
    for recognizes, read in IMPORTERS:
        if recognizes(source):
            return read(source)
    if source.is_dir() and not any(path.suffix.lower() in FILE_TYPES for path in source.iterdir()):
        raise ResultsError(
            f"{source}: the folder holds no known results; give a run folder, an mlruns store, Ray Tune results, "
            "TensorBoard events, trainer_state.json files, or a folder of CSV or JSONL files"
        )
    return None
