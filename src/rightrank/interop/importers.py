"""Importers: turn the results of other tools into rows. Each importer recognizes its own kind of path."""

from __future__ import annotations

from pathlib import Path

from rightrank.data.rows import FILE_TYPES, Row
from rightrank.interop import run_folders, stores
from rightrank.schema.errors import ResultsError

# (recognizes, rows) of each importer. The first that recognizes a path reads it.
IMPORTERS = (
    (stores.recognizes_of_sqlite_store, stores.rows_of_sqlite_store),
    (stores.recognizes, stores.rows),
    (run_folders.recognizes, run_folders.rows),
    (run_folders.recognizes_of_trainer_state, run_folders.rows_of_trainer_state),
    (stores.recognizes_of_tensorboard_events, stores.rows_of_tensorboard_events),
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
