"""Read the rows of result tables: from files, folders and memory, with the settings that only a name states."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from rightrank.data.files import UnreadableError, detect_path_kind, parse_json
from rightrank.data.rows import FILE_TYPES, Row, convert_data_frame, detect_delimiter, read_rows
from rightrank.schema.errors import DataError, ResultsError
from rightrank.tables.columns import SYNONYMS, list_columns, normalize_column, parse_training_name, read_trainer_rows

DECIMAL_COMMA = re.compile(r"[-+]?\d*,\d+(e[-+]?\d+)?", re.IGNORECASE)
DECIMAL_POINT = re.compile(r"[-+]?\d*\.\d+(e[-+]?\d+)?", re.IGNORECASE)
THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(,\d{3})+")
MAX_DEPTH = 8
STAGE_PATTERN = re.compile(r"base|whole|longer|truncated|to step \d+")  # cells of the column `stage` of an exported run
COMPARED_STAGES = {"base", "whole"}


def read_result_rows(source: Path) -> list[Row]:
    """Read the rows of a result file or folder. The names of several files may state `rank`, `lr` and `seed`.

    Raises:
        ResultsError: a path that does not exist, is too large or has no rows.
    """
    if (trainer_rows := read_trainer_rows(source)) is not None:
        return trainer_rows
    if detect_path_kind(source) not in ("file", "folder"):
        raise ResultsError(f"{source}: no such file or folder; give a CSV or JSONL file of results, or a run folder")
    paths_in_folder = sorted(source.iterdir()) if source.is_dir() else []
    files = [path for path in paths_in_folder if path.is_file() and path.suffix.lower() in FILE_TYPES] or [source]
    rows = [row for path in files for row in _read_file(path, use_name=len(files) > 1)]
    if not rows:
        raise ResultsError(f"{source}: a header and no rows; give one row for each training")
    return rows


def _read_file(path: Path, use_name: bool) -> list[Row]:
    """Read the rows of a file. With `use_name`, add the settings in its name for which there is no column."""
    if path.stat().st_size == 0:
        raise ResultsError(f"{path}: the file is empty; give a header and one row for each training")
    try:
        rows = [row for split in read_rows(path).values() for row in split]
        if path.suffix.lower() in (".csv", ".tsv") and detect_delimiter(path) != ",":
            rows = _replace_decimal_commas(rows)
    except DataError as error:
        raise ResultsError(str(error)) from None
    if not use_name:
        return rows
    roles = set(map(normalize_column, list_columns(rows)))
    settings = parse_training_name(
        path.stem, [name for name in ("rank", "lr", "seed") if not roles & set(SYNONYMS[name])]
    )
    return [Row({**settings, **row.fields}, row.origin) for row in rows]


def _replace_decimal_commas(rows: list[Row]) -> list[Row]:
    """Replace decimal commas by points in a table that is not separated by commas.

    A column that contains both commas and points is left unchanged.
    """
    cells = {name: [str(row.fields.get(name) or "").strip() for row in rows] for name in list_columns(rows)}
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

    return [Row({name: read_cell(name, cell) for name, cell in row.fields.items()}, row.origin) for row in rows]


def build_rows(mappings: Any) -> list[Row]:
    """Return the rows of a table in memory: mappings or a data frame, whose index becomes a column if it has a name or text entries.

    Raises:
        ResultsError: an entry that is not a mapping, or no entries.
    """
    index = getattr(mappings, "index", None)
    if any(name is not None for name in getattr(index, "names", ())) or getattr(index, "inferred_type", "") == "string":
        mappings = mappings.reset_index()
    rows = []
    for number, fields in enumerate(convert_data_frame(mappings), start=1):
        if not isinstance(fields, Mapping):
            raise ResultsError(f"row {number}: got a {type(fields).__name__}; give a mapping with `rank` and `value`")
        rows.append(Row(fields, f"row {number}"))
    if not rows:
        raise ResultsError("no rows: give one mapping for each training")
    return flatten_rows(rows)


def flatten_rows(rows: Iterable[Row]) -> list[Row]:
    """Replace nested mappings, and JSON objects in cells, by columns with dotted names."""
    return [Row(dict(_iterate_flat_fields(row.fields)), row.origin) for row in rows]


def _iterate_flat_fields(fields: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, str) and value[:1] == "{" and value[-1:] == "}":
            with suppress(UnreadableError):
                value = parse_json(value)
        if isinstance(value, Mapping) and depth < MAX_DEPTH:
            yield from _iterate_flat_fields(value, f"{prefix}{name}.", depth + 1)
        else:
            yield f"{prefix}{name}", value


def select_comparable_stages(rows: list[Row], table_name: str) -> tuple[list[Row], int]:
    """Return the rows of complete trainings and of the base in an exported run, and the number of omitted rows.

    Other tables are returned unchanged.

    Raises:
        ResultsError: a run whose complete trainings have fewer than two ranks.
    """
    column = next((name for name in list_columns(rows) if normalize_column(name) == "stage"), None)
    if column is None:
        return rows, 0
    stages = [str(row.fields.get(column)).strip() for row in rows]
    if not all(map(STAGE_PATTERN.fullmatch, stages)):
        return rows, 0
    complete_rows = [row for row, stage in zip(rows, stages, strict=True) if stage in COMPARED_STAGES]
    rank = next((name for name in list_columns(rows) if normalize_column(name) in SYNONYMS["rank"]), "")
    ranks = {str(row.fields.get(rank)) for row, stage in zip(rows, stages, strict=True) if stage == "whole"}
    if rank and len(ranks) < 2 and len(complete_rows) < len(rows):
        raise ResultsError(
            f"{table_name}: column {column} says that {len(ranks) or 'no'} rank was trained to the end, and truncated and stopped trainings are "
            "not compared; decide on the run folder itself, or continue its run with --goal training-rank"
        )
    return complete_rows, len(rows) - len(complete_rows)


def add_settings_from_names(rows: list[Row], mapping: Mapping[str, str]) -> list[Row]:
    """Add the settings that names state (`lora-r16-seed0`) as columns if the table has no column for the rank.

    Raises:
        ResultsError: names that state several ranks, or columns of names that state different ranks.
    """
    names = list_columns(rows)
    roles = set(map(normalize_column, names))
    if "rank" in mapping or roles & set(SYNONYMS["rank"]):
        return rows
    setting_names = [
        "rank",
        *(name for name in ("lr", "seed") if name not in mapping and not roles & set(SYNONYMS[name])),
    ]
    columns: dict[str, list[dict[str, str]]] = {}
    first_error: ResultsError | None = None
    for name in names:
        try:
            settings = [parse_training_name(str(row.fields.get(name) or ""), setting_names) for row in rows]
        except ResultsError as error:
            first_error = first_error or error
            continue
        ranks = {by_name.get("rank") for by_name in settings}
        if len(ranks) > 1 and None not in ranks:
            columns[name] = settings
    if not columns and first_error is not None:
        raise first_error
    if not columns:
        return rows
    (column, chosen_settings), *further_columns = columns.items()
    for other_column, settings in further_columns:
        if [by_name["rank"] for by_name in settings] != [by_name["rank"] for by_name in chosen_settings]:
            raise ResultsError(
                f"{rows[0].origin}: columns {column} and {other_column} name other ranks; give a column rank, or leave one of them out"
            )
    return [Row({**by_name, **row.fields}, row.origin) for by_name, row in zip(chosen_settings, rows, strict=True)]
