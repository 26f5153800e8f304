"""SQLite files: an Optuna study or an MLflow store, told apart by their tables. The file is never written to."""

from __future__ import annotations

import sqlite3
from functools import partial
from pathlib import Path

from rightrank.errors import ResultsError
from rightrank.io.importers import mlflow_store, optuna_study
from rightrank.io.reading import kind_of
from rightrank.io.rows import Row

_HEADER = b"SQLite format 3\x00"
MAX_STEPS, CHECK_STEPS = 200_000_000, 100_000  # instructions of SQLite's virtual machine, so that no file can hang it


def recognizes(source: Path) -> bool:
    if kind_of(source) != "file":
        return False
    with source.open("rb") as file:
        return file.read(len(_HEADER)) == _HEADER


def rows(source: Path) -> list[Row]:
    """One row per trial (Optuna), or per run and step (MLflow).

    Raises:
        MissingExtraError: Optuna or MLflow is not installed.
        ResultsError: neither a study nor a store, or one that can't be read.
    """
    tables = _tables(source)
    if {"trials", "trial_params", "trial_values", "studies"} <= tables:
        return optuna_study.rows(source, partial(_connect, source))
    if {"runs", "params", "metrics"} <= tables:
        return mlflow_store.database_rows(source)
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
