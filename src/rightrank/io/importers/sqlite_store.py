"""SQLite files of Optuna (a study) and MLflow (a tracking store), read with the standard library, never written."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from rightrank.errors import ResultsError
from rightrank.io.importers.example_series import split_examples
from rightrank.io.reading import UnreadableError, kind_of, parse_json
from rightrank.io.rows import Row

_HEADER = b"SQLite format 3\x00"
MOST_STEPS, LOOK_STEPS = 200_000_000, 100_000  # of SQLite's machine: a file that needs more is made to hang


def recognizes(source: Path) -> bool:
    if kind_of(source) != "file":
        return False
    with source.open("rb") as file:
        return file.read(len(_HEADER)) == _HEADER


def rows(source: Path) -> list[Row]:
    """One row a trial (Optuna), or a run and step (MLflow).

    Raises:
        ResultsError: neither's tables, a damaged file, or several studies.
    """
    try:
        connection = sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)
        connection.text_factory = lambda text: text.decode("utf-8", "replace")
        looks = iter(range(MOST_STEPS // LOOK_STEPS))
        connection.set_progress_handler(lambda: next(looks, None) is None, LOOK_STEPS)
        connection.execute("PRAGMA trusted_schema = OFF")  # nothing that the file defines is run beside the reading
        try:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if {"trials", "trial_params", "trial_values", "studies"} <= tables:
                return _optuna(connection, source)
            if {"runs", "params", "metrics"} <= tables:
                return _mlflow(connection, source)
        finally:
            connection.close()
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise ResultsError(f"{source}: not a readable SQLite file ({error})") from None
    raise ResultsError(
        f"{source}: holds neither an Optuna study nor an MLflow store (tables: {', '.join(sorted(tables))})"
    )


def _optuna(connection: sqlite3.Connection, source: Path) -> list[Row]:
    studies = connection.execute("SELECT study_id, study_name FROM studies").fetchall()
    if len(studies) != 1:
        names = ", ".join(name for _, name in studies) or "none"
        raise ResultsError(f"{source}: {len(studies)} studies ({names}); give a file with one")
    directions = connection.execute("SELECT direction FROM study_directions ORDER BY objective").fetchall()
    if len(directions) > 1:
        raise ResultsError(f"{source}: a study of {len(directions)} objectives; give one of a single objective")
    higher = bool(directions) and directions[0][0] == "MAXIMIZE"
    found = []
    for trial_id, number, state in connection.execute("SELECT trial_id, number, state FROM trials ORDER BY number"):
        parameters = {
            name: _optuna_value(value, _json(source, distribution))
            for name, value, distribution in connection.execute(
                "SELECT param_name, param_value, distribution_json FROM trial_params WHERE trial_id = ?", (trial_id,)
            )
        }
        attributes = {
            key: _json(source, value)
            for key, value in connection.execute(
                "SELECT key, value_json FROM trial_user_attributes WHERE trial_id = ?", (trial_id,)
            )
        }
        value = connection.execute("SELECT value FROM trial_values WHERE trial_id = ?", (trial_id,)).fetchone()
        fields = {"user_attrs": attributes, "params": parameters, "value": value[0] if value else None}
        told = {"higher_is_better": higher, "trial": f"trial {number}", "status": state}
        found.append(Row(fields | told, f"{source}: trial {number}"))
    return found


def _json(source: Path, text: object) -> Any:
    try:
        return parse_json(str(text))
    except UnreadableError as error:
        raise ResultsError(f"{source}: a cell that is not JSON ({error}); restore the file") from None


def _optuna_value(value: Any, distribution: Any) -> Any:
    """A categorical parameter is stored as the number of its choice; None where there is no such choice."""
    match distribution:
        case {"name": "CategoricalDistribution", "attributes": {"choices": [*choices]}}:
            return dict(enumerate(choices)).get(value)
    return value


def _mlflow(connection: sqlite3.Connection, source: Path) -> list[Row]:
    found = []
    for run_id, status in connection.execute("SELECT run_uuid, status FROM runs ORDER BY start_time").fetchall():
        parameters = dict(connection.execute("SELECT key, value FROM params WHERE run_uuid = ?", (run_id,)))
        steps: dict[int, dict[str, float]] = {}
        for key, value, step in connection.execute(
            "SELECT key, value, step FROM metrics WHERE run_uuid = ? AND is_nan = 0", (run_id,)
        ):
            steps.setdefault(step, {})[key] = value
        plain, items = split_examples(steps)
        for step, metrics in plain.items():
            fields = {"params": parameters, "metrics": metrics, "step": step, "trial": run_id, "status": status}
            found.append(Row(fields, f"{source}: run {run_id}, step {step}"))
        for item in items:
            fields = {"params": parameters, "metrics": item.values, "trial": run_id, "status": status, **item.place}
            found.append(Row(fields, f"{source}: run {run_id}, item {item.number}"))
    return found
