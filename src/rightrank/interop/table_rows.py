"""Read the rows of result tables: from files, folders and memory, with the settings that only a name states."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from rightrank.data.files import UnreadableError, parse_json, path_kind
from rightrank.data.rows import FILE_TYPES, Row, cell_delimiter, read_rows, records_of_frame
from rightrank.interop.columns import SYNONYMS, import_rows, names_of, plain, settings_of_name
from rightrank.schema.errors import DataError, ResultsError

DECIMAL_COMMA = re.compile(r"[-+]?\d*,\d+(e[-+]?\d+)?", re.IGNORECASE)
DECIMAL_POINT = re.compile(r"[-+]?\d*\.\d+(e[-+]?\d+)?", re.IGNORECASE)
THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(,\d{3})+")
MAX_DEPTH = 8
STAGES = re.compile(r"base|whole|truncated|(annealed )?to step \d+")  # cells of the column `stage` of an exported run
COMPARED_STAGES = {"base", "whole"}


def raw_rows(source: Path) -> list[Row]:
    """The rows of a file or folder of results; the name of a file in a folder may say `rank`, `lr` and `seed`.

    Raises:
        ResultsError: a path that is missing, too large or without rows.
    """
    if (imported := import_rows(source)) is not None:
        return imported
    if path_kind(source) not in ("file", "folder"):
        raise ResultsError(f"{source}: no such file or folder; give a CSV or JSONL file of results, or a run folder")
    inside = sorted(source.iterdir()) if source.is_dir() else []
    files = [path for path in inside if path.is_file() and path.suffix.lower() in FILE_TYPES] or [source]
    rows = [row for path in files for row in _file_rows(path, named=len(files) > 1)]
    if not rows:
        raise ResultsError(f"{source}: a header and no rows; give one row for each training")
    return rows


def _file_rows(path: Path, named: bool) -> list[Row]:
    """The rows of one file, with the settings in its name that no column has where `named`."""
    if path.stat().st_size == 0:
        raise ResultsError(f"{path}: the file is empty; give a header and one row for each training")
    try:
        rows = [row for split in read_rows(path).values() for row in split]
        if path.suffix.lower() in (".csv", ".tsv") and cell_delimiter(path) != ",":
            rows = _with_decimal_points(rows)
    except DataError as error:
        raise ResultsError(str(error)) from None
    if not named:
        return rows
    roles = set(map(plain, names_of(rows)))
    settings = settings_of_name(path.stem, [name for name in ("rank", "lr", "seed") if not roles & set(SYNONYMS[name])])
    return [Row({**settings, **row.fields}, row.where) for row in rows]


def _with_decimal_points(rows: list[Row]) -> list[Row]:
    """Return the rows of a table whose cells no comma separates, with decimal commas as points; of a column with both none is read."""
    cells = {name: [str(row.fields.get(name) or "").strip() for row in rows] for name in names_of(rows)}
    has_points = any(map(DECIMAL_POINT.fullmatch, chain.from_iterable(cells.values())))
    comma_columns = set()
    for name, texts in cells.items():
        commas = [text for text in texts if DECIMAL_COMMA.fullmatch(text)]
        may_be_thousands = has_points and all(map(THOUSANDS.fullmatch, commas))
        if commas and not may_be_thousands and not any(map(DECIMAL_POINT.fullmatch, texts)):
            comma_columns.add(name)

    def read_cell(name: str, cell: Any) -> Any:
        is_decimal = name in comma_columns and DECIMAL_COMMA.fullmatch(str(cell).strip())
        return str(cell).replace(",", ".") if is_decimal else cell

    return [Row({name: read_cell(name, cell) for name, cell in row.fields.items()}, row.where) for row in rows]


def rows_of_mappings(mappings: Any) -> list[Row]:
    """Rows of a table in memory: mappings, or a data frame, whose index is a column if it has a name, or names as entries.

    Raises:
        ResultsError: an entry that is not a mapping, or no entries.
    """
    index = getattr(mappings, "index", None)
    if any(name is not None for name in getattr(index, "names", ())) or getattr(index, "inferred_type", "") == "string":
        mappings = mappings.reset_index()
    rows = []
    for number, fields in enumerate(records_of_frame(mappings), start=1):
        if not isinstance(fields, Mapping):
            raise ResultsError(f"row {number}: got a {type(fields).__name__}; give a mapping with `rank` and `value`")
        rows.append(Row(fields, f"row {number}"))
    if not rows:
        raise ResultsError("no rows: give one mapping for each training")
    return flatten_rows(rows)


def flatten_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows with nested mappings, and JSON objects in cells, as dotted names."""
    return [Row(dict(_flat(row.fields)), row.where) for row in rows]


def _flat(fields: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, str) and value[:1] == "{" and value[-1:] == "}":
            with suppress(UnreadableError):
                value = parse_json(value)
        if isinstance(value, Mapping) and depth < MAX_DEPTH:
            yield from _flat(value, f"{prefix}{name}.", depth + 1)
        else:
            yield f"{prefix}{name}", value


def select_comparable_stages(rows: list[Row], where: str) -> tuple[list[Row], int]:
    """Return the rows of complete trainings and of the base of an exported run, and the number of the others; another table as it is.

    Raises:
        ResultsError: a run whose complete trainings have fewer than two ranks.
    """
    column = next((name for name in names_of(rows) if plain(name) == "stage"), None)
    if column is None:
        return rows, 0
    stages = [str(row.fields.get(column)).strip() for row in rows]
    if not all(map(STAGES.fullmatch, stages)):
        return rows, 0
    complete_rows = [row for row, stage in zip(rows, stages, strict=True) if stage in COMPARED_STAGES]
    rank = next((name for name in names_of(rows) if plain(name) in SYNONYMS["rank"]), "")
    ranks = {str(row.fields.get(rank)) for row, stage in zip(rows, stages, strict=True) if stage == "whole"}
    if rank and len(ranks) < 2 and len(complete_rows) < len(rows):
        raise ResultsError(
            f"{where}: column {column} says that {len(ranks) or 'no'} rank was trained to the end, and truncated and stopped trainings are "
            "not compared; decide on the run folder itself, or continue its run with --goal training-rank"
        )
    return complete_rows, len(rows) - len(complete_rows)


def add_settings_from_names(rows: list[Row], mapping: Mapping[str, str]) -> list[Row]:
    """Rows whose rank is in their name alone (`lora-r16-seed0`), with what the names say as columns; others as they are."""
    names = names_of(rows)
    roles = set(map(plain, names))
    if "rank" in mapping or roles & set(SYNONYMS["rank"]):
        return rows
    wanted = ["rank", *(name for name in ("lr", "seed") if name not in mapping and not roles & set(SYNONYMS[name]))]
    columns: dict[str, list[dict[str, str]]] = {}
    unclear: ResultsError | None = None
    for name in names:
        try:
            settings = [settings_of_name(str(row.fields.get(name) or ""), wanted) for row in rows]
        except ResultsError as error:
            unclear = unclear or error
            continue
        ranks = {by_name.get("rank") for by_name in settings}
        if len(ranks) > 1 and None not in ranks:
            columns[name] = settings
    if not columns and unclear is not None:
        raise unclear
    if not columns:
        return rows
    (column, chosen), *others = columns.items()
    for other, settings in others:
        if [by_name["rank"] for by_name in settings] != [by_name["rank"] for by_name in chosen]:
            raise ResultsError(
                f"{rows[0].where}: columns {column} and {other} name other ranks; give a column rank, or leave one of them out"
            )
    return [Row({**by_name, **row.fields}, row.where) for by_name, row in zip(chosen, rows, strict=True)]
