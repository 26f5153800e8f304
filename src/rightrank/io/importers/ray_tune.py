"""Ray Tune's result folders: params.json beside result.json (one JSON object per report) or progress.csv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rightrank.errors import DataError, ResultsError
from rightrank.io.importers.path_settings import read_object
from rightrank.io.reading import UnreadableError, parse_json, read_text
from rightrank.io.rows import Row, read_rows

MAX_DEPTH = 3
MAX_BYTES = 2**28  # of one trial's reports
# Fields that Ray adds to every report.
_HOUSEKEEPING = {"pid", "hostname", "node_ip", "date", "timestamp", "trial_id", "done", "config"}


def recognizes(source: Path) -> bool:
    return source.is_dir() and bool(_trials(source))


def rows(source: Path) -> list[Row]:
    """One row per report, with the trial's parameters.

    Raises:
        ResultsError: a report that is not JSON, or no reports.
    """
    found: list[Row] = []
    for trial in _trials(source):
        parameters = read_object(trial / "params.json")
        for report, where in _reports(trial):
            values = {name: value for name, value in report.items() if name not in _HOUSEKEEPING}
            found.append(Row({"config": parameters, **values, "trial": trial.name}, where))
    if not found:
        raise ResultsError(f"{source}: the trials reported nothing (empty result.json files)")
    return found


def _trials(source: Path) -> list[Path]:
    patterns = ("/".join(["*"] * depth + ["params.json"]) for depth in range(MAX_DEPTH))
    return sorted(
        path.parent
        for pattern in patterns
        for path in source.glob(pattern)
        if (path.parent / "result.json").exists() or (path.parent / "progress.csv").exists()
    )


def _reports(trial: Path) -> list[tuple[dict[str, Any], str]]:
    path = trial / "result.json"
    if not path.exists() or path.stat().st_size == 0:
        return _table_reports(trial / "progress.csv")
    found = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        try:
            report = parse_json(line)
        except UnreadableError:
            raise ResultsError(f"{path}:{number}: not JSON; remove the line if the trial was interrupted") from None
        if isinstance(report, dict):
            found.append((report, f"{path}:{number}"))
    return found


def _text(path: Path) -> str:
    try:
        return read_text(path, MAX_BYTES)
    except UnreadableError as error:
        raise ResultsError(f"{path}: can't read it ({error}); restore the file, or leave its trial out") from None


def _table_reports(path: Path) -> list[tuple[dict[str, Any], str]]:
    if not path.exists() or path.stat().st_size == 0:
        return []
    try:
        return [(dict(row.fields), row.where) for rows in read_rows(path).values() for row in rows]
    except DataError as error:
        raise ResultsError(str(error)) from None
