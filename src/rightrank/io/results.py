"""Tables of finished trainings from other tools; every error names the file and the row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rightrank.errors import DataError, ResultsError
from rightrank.io.columns import Columns, direction_of, identify_columns
from rightrank.io.gathering import Key, TrainingRows, gather, is_blank, results_of
from rightrank.io.importers import import_rows
from rightrank.io.reading import UnreadableError, is_text, kind_of, parse_json
from rightrank.io.rows import FILE_TYPES, Row, read_rows
from rightrank.records import Result, ResultsTable
from rightrank.settings.metric_names import unknown_direction

MAX_FILE_BYTES = 200 * 2**20  # about 5 million rows
MAX_DEPTH = 8


@dataclass(frozen=True, slots=True)
class TableOptions:
    metric: str | None = None
    higher_is_better: bool | None = None
    mapping: Mapping[str, str] = field(default_factory=dict)


def flat(rows: Iterable[Row]) -> list[Row]:
    """Rows with nested mappings as dotted names."""
    return [Row(dict(_flat(row.fields)), row.where) for row in rows]


def results_of_rows(rows: list[Row], asked: TableOptions, where: str) -> ResultsTable:
    names = list(dict.fromkeys(name for row in rows for name in row.fields))
    columns = identify_columns(names, asked.metric, asked.mapping, where)
    rows, metric = _one_metric(rows, columns, asked.metric, where)
    trainings, missing, notes = gather(rows, columns, metric)
    results = [*results_of(trainings, columns), *missing]
    _require_comparable(results, trainings, where)
    higher, why = _direction(rows, columns, metric, asked.higher_is_better, where)
    understood = [f"{name} from column {column}" for name, column in columns.by_name.items() if name != column]
    understood.append(f"value from column {columns.value}: {'higher' if higher else 'lower'} is better ({why})")
    return ResultsTable(metric=metric, higher_is_better=higher, results=results, understood=understood + notes)


def rows_of_mappings(mappings: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows of a table in memory.

    Raises:
        ResultsError: an entry that is not a mapping, or no entries.
    """
    rows = []
    for number, fields in enumerate(mappings, start=1):
        if not isinstance(fields, Mapping):
            raise ResultsError(f"row {number}: got a {type(fields).__name__}; give a mapping with `rank` and `value`")
        rows.append(Row(dict(_flat(fields)), f"row {number}"))
    if not rows:
        raise ResultsError("no rows: give one mapping for each training")
    return rows


def raw_rows(source: Path) -> list[Row]:
    if kind_of(source) not in ("file", "folder"):
        raise ResultsError(f"{source}: no such file or folder; give a CSV or JSONL file of results, or a run folder")
    imported = import_rows(source)
    if imported is not None:
        return imported
    inside = [source] if source.is_file() else sorted(source.iterdir())
    for path in inside:
        if path.is_file() and (path == source or path.suffix.lower() in FILE_TYPES):
            _require_table_size(path)
    try:
        rows = [row for split in read_rows(source).values() for row in split]
    except DataError as error:
        raise ResultsError(str(error)) from None
    if not rows:
        raise ResultsError(f"{source}: a header and no rows; give one row for each training")
    return rows


def _require_table_size(path: Path) -> None:
    """Reject empty and very large files before reading them."""
    size = path.stat().st_size
    if size == 0:
        raise ResultsError(f"{path}: the file is empty; give a header and one row for each training")
    if size > MAX_FILE_BYTES:
        raise ResultsError(
            f"{path}: {size / 2**20:,.0f} MiB is too large for a table of results (limit {MAX_FILE_BYTES // 2**20} MiB); "
            "give one row for each training, or for each training and item"
        )


def _flat(fields: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Flatten nested mappings and JSON objects in cells to dotted names."""
    for name, value in fields.items():
        if isinstance(value, str) and not is_text(value):
            value = value.encode("utf-8", "replace").decode()
        if isinstance(value, str) and value[:1] == "{" and value[-1:] == "}":
            value = _object(value)
        if isinstance(value, Mapping) and depth < MAX_DEPTH:
            yield from _flat(value, f"{prefix}{name}.", depth + 1)
        else:
            yield f"{prefix}{name}".encode("utf-8", "replace").decode(), value


def _object(text: str) -> Any:
    try:
        return parse_json(text)
    except UnreadableError:
        return text


def _one_metric(rows: list[Row], columns: Columns, asked: str | None, where: str) -> tuple[list[Row], str]:
    """`(rows of the metric, its name)`; a metric column selects the rows."""
    column = columns.get("metric")
    if column is None or column == columns.value:
        return rows, columns.metric
    names = sorted({str(row.fields.get(column)) for row in rows if not is_blank(row.fields.get(column))})
    if asked in names:
        return [row for row in rows if row.fields.get(column) == asked], str(asked)
    if len(names) > 1:
        raise ResultsError(f"{where}: column {column} holds several metrics ({', '.join(names)}); choose one: --metric")
    return rows, names[0] if names else columns.metric


def _direction(rows: list[Row], columns: Columns, metric: str, asked: bool | None, where: str) -> tuple[bool, str]:
    """`(higher is better, why)`.

    Raises:
        ResultsError: neither the user nor the table says it, and the metric's name is not a known one.
    """
    if asked is not None:
        return asked, "as given"
    column = columns.get("higher_is_better")
    if column is not None:
        values = {str(row.fields.get(column)).strip().lower() for row in rows if not is_blank(row.fields.get(column))}
        if len(values) > 1:
            raise ResultsError(
                f"{rows[0].where}: column {column} has both values; give one direction, or --higher-is-better"
            )
        if values:
            return values.pop() in ("true", "1", "1.0", "yes"), f"column {column}"
    known = direction_of(metric)
    if known is None:
        raise ResultsError(
            f"{where}: {unknown_direction(metric)}; give --higher-is-better or --lower-is-better, or --metric NAME"
        )
    return known, f"from its name, {metric}"


def _require_comparable(results: list[Result], trainings: Mapping[Key, TrainingRows], where: str) -> None:
    trained = [result for result in results if result.rank > 0 and result.value is not None]
    ranks = {result.rank for result in trained}
    if not ranks:
        raise ResultsError(f"{where}: no row has both a rank and a held-out value; give one row for each training")
    if len(ranks) < 2:
        raise ResultsError(f"{where}: one rank only ({ranks.pop()}); give two or more to compare")
    if len({result.value for result in trained}) == 1 and len({tuple(result.item_values) for result in trained}) == 1:
        raise ResultsError(
            f"{where}: every training has the value {trained[0].value:g}, so there is nothing to compare; give the held-out metric"
        )
    rates = {result.learning_rate > 0 for result in trained}
    if len(rates) > 1:
        bare = next(run for key, run in trainings.items() if key[0] > 0 and key[1] == 0)
        raise ResultsError(
            f"{bare.where}: no learning rate, though other rows have one; give it, or leave the column out"
        )
