"""Reads rows from JSONL, JSON, CSV, TSV, Parquet and saved `datasets` folders.

A row is a mapping with its origin, so that every error can name file and line.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rightrank.data.files import UnreadableError, parse_json, path_kind, read_json_object
from rightrank.schema.errors import DataError, did_you_mean
from rightrank.schema.trials import SplitName

FILE_TYPES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
SPLIT_NAMES: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "selection": "selection",
    "validation": "selection",
    "valid": "selection",
    "val": "selection",
    "dev": "selection",
    "eval": "selection",
    "test": "test",
}
MAX_LINE_CHARACTERS = 2**26  # of a JSONL line; 64 MiB in one example is a mistake
MAX_SHOWN_LINES = 20
_CSV_FIELD_LIMIT = 2**24  # characters


@dataclass(frozen=True, slots=True)
class Row:
    """One row and its origin (`file:line`)."""

    fields: Mapping[str, Any]
    where: str


RowsBySplit = dict[SplitName | None, Iterator[Row]]  # iterators that read on demand, once; key None: not yet split


def read_rows(source: Path | Any) -> RowsBySplit:
    """The rows of a file, of a folder or in memory, by split where the source names splits.

    In memory they are a `datasets` object, an iterable of mappings, a data frame, or a mapping of splits to these. In a folder,
    a file whose name begins with train, validation (or val, dev, selection) or test is that split. If no file's name does, the
    rows are not yet split.

    Raises:
        DataError: no such file, none of a known type, or a split with an unknown name; while iterating: a row that can't be read.
    """
    if not isinstance(source, Path):
        return _rows_in_memory(source)
    found_kind = path_kind(source)
    if found_kind == "missing":
        beside = source.parent.iterdir() if source.parent.is_dir() else ()
        near = did_you_mean(source.name, [file.name for file in beside])
        raise DataError(f"{source}: no such file or folder{near}; give {_types_allowed()}")
    if found_kind == "other":
        raise DataError(f"{source}: neither a regular file nor a folder; give {_types_allowed()}")
    suffix = source.suffix.lower()
    if found_kind == "file" and suffix not in FILE_TYPES:
        raise DataError(f"{source}: files of type {suffix or '(no ending)'!r} are not read; give {_types_allowed()}")
    if found_kind == "file":
        return {None: _file_rows(source)}
    if _is_saved_dataset(source):
        return _saved_dataset_rows(source)
    files = sorted(path for path in source.iterdir() if path.suffix.lower() in FILE_TYPES and path.is_file())
    if not files:
        raise DataError(f"{source}: the folder holds no data file; give {_types_allowed()}")
    by_split: dict[SplitName | None, list[Path]] = {}
    for path in files:
        by_split.setdefault(split_of(path.stem), []).append(path)
    chained: RowsBySplit = {split: chain.from_iterable(map(_file_rows, paths)) for split, paths in by_split.items()}
    if None in chained and len(chained) > 1:
        unnamed = next(path.name for path in files if split_of(path.stem) is None)
        raise DataError(
            f"{source}: {unnamed} belongs to no split but other files do; name every file train*, validation* or test*, or none"
        )
    return chained


def require_rows(source: Path) -> None:
    """Refuse a file or folder that is missing, or of a type that is not read, without reading it.

    Raises:
        DataError: as `read_rows` raises.
    """
    if not _is_saved_dataset(source):
        read_rows(source)


def held_out_fields(source: Path) -> list[Mapping[str, Any]]:
    """The test rows of a file or folder; else its validation rows; all rows where they are not split."""
    rows = read_rows(source)
    kept = next((split for split in ("test", "selection") if split in rows), None)
    return [row.fields for row in (rows[kept] if kept is not None else chain.from_iterable(rows.values()))]


def _rows_in_memory(source: Any) -> RowsBySplit:
    if not isinstance(source, Mapping):
        return {None: _memory_rows(records_of_frame(source), "row")}
    by_split: RowsBySplit = {}
    for name, rows in source.items():
        split = SPLIT_NAMES.get(str(name))
        if split is None:
            raise DataError(f"split {name!r} is not known; allowed: {', '.join(SPLIT_NAMES)}")
        by_split[split] = chain(by_split.get(split, ()), _memory_rows(records_of_frame(rows), f"{name} row"))
    return by_split


def records_of_frame(rows: Any) -> Any:
    """The rows of a pandas or polars DataFrame as mappings, missing values as None; anything else as it is."""
    if hasattr(rows, "to_dicts"):
        return rows.to_dicts()
    if not (hasattr(rows, "itertuples") and hasattr(rows, "to_dict")):
        return rows
    return [{name: None if value != value else value for name, value in row.items()} for row in rows.to_dict("records")]


def _memory_rows(rows: Iterable[Any], what: str) -> Iterator[Row]:
    for number, fields in enumerate(rows, start=1):
        if not isinstance(fields, Mapping):
            raise DataError(f"{what} {number}: got a {type(fields).__name__}; give a mapping with text columns")
        yield Row(fields, f"{what} {number}")


def _file_rows(path: Path) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; give at least one row of text")
    try:
        with path.open("rb") as file:
            is_list = file.read(64).lstrip().startswith(b"[")
        if suffix == ".parquet":
            yield from _parquet_rows(path)
        elif suffix in (".csv", ".tsv"):
            yield from _csv_rows(path)
        elif suffix == ".json" and is_list:
            yield from _json_list_rows(path)
        else:
            yield from _jsonl_rows(path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8, or give {_types_allowed()}"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: can't read it ({error.strerror or error}); give a file that can be read") from None


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        lines = enumerate(iter(lambda: file.readline(MAX_LINE_CHARACTERS + 1), ""), start=1)
        for number, line in lines:
            if len(line) > MAX_LINE_CHARACTERS:
                raise DataError(
                    f"{path}:{number}: a line of over {MAX_LINE_CHARACTERS:,} characters; give one object a line"
                )
            if not line.strip():
                continue
            fields, wrong = _object_of(line)
            if wrong:
                broken = [other for other, text in lines if text.strip() and _object_of(text)[1]]
                shown = ", ".join(map(str, broken[:MAX_SHOWN_LINES])) + (", …" if len(broken) > MAX_SHOWN_LINES else "")
                others = f" ({len(broken):,} more: {shown})" if broken else ""
                raise DataError(f"{path}:{number}: {wrong}{others}; give one JSON object a line")
            yield Row(fields, f"{path}:{number}")


def _object_of(line: str) -> tuple[dict[str, Any], str]:
    """`(the object of a line, what is wrong with it)`."""
    try:
        fields = parse_json(line)
    except UnreadableError as error:
        return {}, f"not JSON ({error})"
    return (fields, "") if isinstance(fields, dict) else ({}, f"got a {type(fields).__name__}")


def _json_list_rows(path: Path) -> Iterator[Row]:
    try:
        rows = parse_json(path.read_text(encoding="utf-8-sig"))
    except UnreadableError as error:
        raise DataError(
            f"{path}:{error.line}: not JSON ({error}); give a list of objects, or one object a line"
        ) from None
    for number, fields in enumerate(rows, start=1):
        if not isinstance(fields, dict):
            raise DataError(f"{path}: entry {number} is a {type(fields).__name__}; give a list of objects")
        yield Row(fields, f"{path}: entry {number}")


def cell_delimiter(path: Path) -> str:
    """Return what stands between the cells of a CSV or TSV file. Spreadsheets of many countries write semicolons."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        header = lines.readline()
    if "," not in header and ";" in header:
        return ";"
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    delimiter = cell_delimiter(path)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            for fields in reader:
                if None in fields:
                    raise DataError(
                        f"{path}:{reader.line_num}: more cells than the header has columns; quote cells that hold {delimiter!r}"
                    )
                yield Row(fields, f"{path}:{reader.line_num}")
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not {path.suffix[1:].upper()} ({error})") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for fields in batch.to_pylist():
                number += 1
                yield Row(fields, f"{path}: row {number}")
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        # ValueError and OverflowError: dates and texts that Python can't represent
        raise DataError(f"{path}: not a readable Parquet file ({error}); write it again") from None


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def _saved_dataset_rows(folder: Path) -> RowsBySplit:
    """Rows of the Arrow tables without decoding: no file or address that a row names is opened."""
    import datasets

    with _reading_saved(folder):
        _require_own_files(folder)
        loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        return _rows_in_memory({name: _plain_rows(split, folder) for name, split in loaded.items()})
    return _rows_in_memory(_plain_rows(loaded, folder))


def _plain_rows(dataset: Any, folder: Path) -> Iterator[dict[str, Any]]:
    with _reading_saved(folder):
        for table in dataset.with_format("arrow").iter(batch_size=1000):
            yield from table.to_pylist()


@contextmanager
def _reading_saved(folder: Path) -> Iterator[None]:
    """Report what `datasets` raises on damaged files as a `DataError`."""
    import pyarrow

    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{folder}: not a folder that datasets.save_to_disk wrote ({error}); save the dataset again"
        ) from None


def _require_own_files(folder: Path) -> None:
    """Reject a saved dataset with splits or tables outside its folder."""
    splits = folder / "dataset_dict.json"
    names = read_json_object(splits)["splits"] if splits.exists() else []
    states = [folder / name / "state.json" for name in names] if names else [folder / "state.json"]
    for name in [*names, *(file["filename"] for state in states for file in read_json_object(state)["_data_files"])]:
        if Path(name).name != name or name == "..":
            raise DataError(f"{folder}: names {name!r}, which is not in the folder; save the dataset again")


def split_of(stem: str) -> SplitName | None:
    """The split that a file's name says."""
    return SPLIT_NAMES.get(re.split("[-_. ]", stem)[0].lower())


def _types_allowed() -> str:
    return f"a file ending in {', '.join(FILE_TYPES)}, a folder of such files, or a saved `datasets` folder"
