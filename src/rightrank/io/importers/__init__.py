"""Results as other tools keep them, brought to rows. Each importer says whether a path is one of its own."""

from __future__ import annotations

from pathlib import Path

from rightrank.errors import ResultsError
from rightrank.io.importers import mlflow_store, ray_tune, sqlite_store, tensorboard_events, trainer_state
from rightrank.io.rows import FILE_TYPES, Row

# Each pair: what makes it ours, and how to read it. The first that recognizes the path reads it.
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
        ResultsError: an importer's own complaint, or a folder with nothing that is known.
    """
    for recognizes, read in IMPORTERS:
        if recognizes(source):
            return read(source)
    if source.is_dir() and not any(path.suffix.lower() in FILE_TYPES for path in source.iterdir()):
        raise ResultsError(
            f"{source}: the folder holds no results that are known: give a run folder, an mlruns store, Ray Tune results, "
            "TensorBoard events, trainer_state.json files, or a folder of CSV or JSONL files"
        )
    return None
