"""Read rows from JSONL, JSON, CSV, TSV and Parquet files, and draw samples of them.

A row is a mapping with its origin, so that every error can name file and line.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from rightrank.data.files import ROW_DECODER, UnreadableError, detect_path_kind, find_repeated_name, parse_json
from rightrank.data.hub import HubData, parse_hub_name, read_hub_rows
from rightrank.schema.errors import DataError, suggest_name
from rightrank.schema.trials import SplitName

FILE_TYPES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
ALLOWED_SOURCES = (
    f"a file ending in {', '.join(FILE_TYPES)}, a folder of such files, or the name of a data set on the hub"
)
SPLIT_NAMES: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "selection": "validation",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
}
MAX_LINE_CHARACTERS = 2**26  # of a JSONL line; a longer line is a mistake
ROWS_PER_CONVERSION = 1000  # rows of a Parquet file that are Python objects at a time
MAX_DETECTION_ROWS = 256  # rows that are read to tell prompts that are questions from a few repeated instructions
MIN_ROWS_PER_INSTRUCTION = 16  # prompts that so many rows share on average are instructions
SAMPLE_STREAM = int.from_bytes(b"rightrank")


@dataclass(frozen=True, slots=True)
class Row:
    """A row and its origin (`file:line`)."""

    fields: Mapping[str, Any]
    origin: str


RowsBySplit = dict[
    SplitName | None, Iterator[Row]
]  # Iterators that read lazily and once. The key None is for rows that are not split yet.


def read_rows(source: Path | Any, config: str = "") -> RowsBySplit:
    """Read the rows of a file, of a folder, of a data set on the hub or in memory, by split if the source names splits.

    Sources in memory are a `datasets` object, an iterable of mappings, a data frame, or a mapping from splits to these. In a folder,
    a file belongs to the split that its name begins with: train, validation (or val, dev, selection) or test. If no file name begins with
    a split, the rows are not split yet.

    Args:
        config: the configuration of a data set on the hub.

    Raises:
        DataError: no such file, no file of a supported type, or an unknown split name; while iterating: a row that cannot be read.
    """
    if not isinstance(source, Path):
        return _read_memory(source)
    path_kind = detect_path_kind(source)
    hub_data = find_hub_data(source)
    if hub_data is not None:
        return _read_memory(
            read_hub_rows(hub_data, config), f"{hub_data}: name a split, such as {hub_data.name}:train; "
        )
    if path_kind in ("missing", "other"):
        siblings = source.parent.iterdir() if source.parent.is_dir() else ()
        suggestion = suggest_name(source.name, [file.name for file in siblings])
        raise DataError(f"{source}: no such file or folder{suggestion}; give {ALLOWED_SOURCES}")
    suffix = source.suffix.lower()
    if path_kind == "file" and suffix not in FILE_TYPES:
        raise DataError(
            f"{source}: files of type {suffix or '(no extension)'!r} are not supported; give {ALLOWED_SOURCES}"
        )
    if path_kind == "file":
        return {None: _read_file(source)}
    if any((source / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise DataError(
            f"{source}: a folder that `datasets` saved; give the object in Python, or save it with `to_parquet`"
        )
    files = sorted(path for path in source.iterdir() if path.suffix.lower() in FILE_TYPES and path.is_file())
    if not files:
        raise DataError(f"{source}: the folder contains no data file; give {ALLOWED_SOURCES}")
    by_split: dict[SplitName | None, list[Path]] = {}
    for path in files:
        by_split.setdefault(parse_split_name(path.stem), []).append(path)
    chained: RowsBySplit = {split: chain.from_iterable(map(_read_file, paths)) for split, paths in by_split.items()}
    if None in chained and len(chained) > 1:
        unnamed = next(path.name for path in files if parse_split_name(path.stem) is None)
        raise DataError(
            f"{source}: {unnamed} belongs to no split but other files do; name every file train*, validation* or test*, or none"
        )
    return chained


def find_hub_data(source: Path) -> HubData | None:
    """Return the data set on the hub that a path which does not exist may name; None for the name of a data file."""
    is_file_name = source.suffix.lower() in FILE_TYPES
    return None if is_file_name or detect_path_kind(source) != "missing" else parse_hub_name(str(source))


def can_be_read(name: str) -> bool:
    """Return whether a run's data can still be read by their name: they are there, or on the hub."""
    return Path(name).exists() or find_hub_data(Path(name)) is not None


def _read_memory(source: Any, hint: str = "") -> RowsBySplit:
    if not isinstance(source, Mapping):
        return {None: _iterate_mappings(convert_data_frame(source), "row")}
    by_split: RowsBySplit = {}
    for name, rows in source.items():
        split = SPLIT_NAMES.get(str(name))
        if split is None:
            raise DataError(f"{hint}unknown split {name!r}; allowed: {', '.join(SPLIT_NAMES)}")
        by_split[split] = chain(by_split.get(split, ()), _iterate_mappings(convert_data_frame(rows), f"{name} row"))
    return by_split


def convert_data_frame(rows: Any) -> Any:
    """Convert a pandas or polars DataFrame to mappings, with None for missing values. Return other objects unchanged."""
    if hasattr(rows, "to_dicts"):
        return rows.to_dicts()
    if not (hasattr(rows, "itertuples") and hasattr(rows, "to_dict")):
        return rows
    _require_distinct_columns("data frame", list(map(str, rows.columns)))
    return [{name: None if value != value else value for name, value in row.items()} for row in rows.to_dict("records")]


def _require_distinct_columns(source: str, names: Sequence[str]) -> None:
    """Raise if two columns have one name, of which only the last would be read.

    Raises:
        DataError: names the source and the column.
    """
    repeated = find_repeated_name(names)
    if repeated is not None:
        raise DataError(f"{source}: two columns are named {repeated!r}; rename one of them, or remove it")


def _iterate_mappings(rows: Iterable[Any], label: str) -> Iterator[Row]:
    for number, fields in enumerate(rows, start=1):
        if not isinstance(fields, Mapping):
            raise DataError(f"{label} {number}: got {type(fields).__name__}; give a mapping with text columns")
        yield Row(fields, f"{label} {number}")


def _read_file(path: Path) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; give at least one row of text")
    try:
        with path.open("rb") as file:
            is_list = file.read(64).lstrip().startswith(b"[")
        if suffix == ".parquet":
            yield from _read_parquet(path)
        elif suffix in (".csv", ".tsv"):
            yield from _read_csv(path)
        elif suffix == ".json" and is_list:
            yield from _read_json_list(path)
        else:
            yield from _read_jsonl(path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8, or give {ALLOWED_SOURCES}"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: can't read it ({error.strerror or error}); give a file that can be read") from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_CHARACTERS + 1), ""), start=1):
            if len(line) > MAX_LINE_CHARACTERS:
                raise DataError(
                    f"{path}:{number}: a line of over {MAX_LINE_CHARACTERS:,} characters; give one object a line"
                )
            if not line.strip():
                continue
            try:
                fields = parse_json(line, ROW_DECODER)
            except UnreadableError as error:
                raise DataError(f"{path}:{number}: not JSON ({error}); give one JSON object a line") from None
            if not isinstance(fields, dict):
                raise DataError(f"{path}:{number}: got {type(fields).__name__}; give one JSON object a line")
            yield Row(fields, f"{path}:{number}")


def _read_json_list(path: Path) -> Iterator[Row]:
    try:
        rows = parse_json(path.read_text(encoding="utf-8-sig"), ROW_DECODER)
    except UnreadableError as error:
        raise DataError(
            f"{path}:{error.line}: not JSON ({error}); give a list of objects, or one object a line"
        ) from None
    for number, fields in enumerate(rows, start=1):
        if not isinstance(fields, dict):
            raise DataError(f"{path}: entry {number} is a {type(fields).__name__}; give a list of objects")
        yield Row(fields, f"{path}: entry {number}")


def detect_delimiter(path: Path) -> str:
    """Return the delimiter of a CSV or TSV file. Spreadsheets in many countries write semicolons."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        header = lines.readline()
    if "," not in header and ";" in header:
        return ";"
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**24)  # characters
    delimiter = detect_delimiter(path)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            _require_distinct_columns(str(path), list(filter(None, reader.fieldnames or ())))
            for fields in reader:
                if None in fields:
                    raise DataError(
                        f"{path}:{reader.line_num}: more cells than the header has columns; quote cells that hold {delimiter!r}"
                    )
                yield Row(fields, f"{path}:{reader.line_num}")
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not {path.suffix[1:].upper()} ({error})") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _require_distinct_columns(str(path), file.schema_arrow.names)
        batches = file.iter_batches(ROWS_PER_CONVERSION)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, fields in enumerate(rows, start=1):
            yield Row(fields, f"{path}: row {number}")
    # What pyarrow raises for damaged files, and for dates and texts that Python cannot represent.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); write it again") from None


def parse_split_name(stem: str) -> SplitName | None:
    """Return the split that a file's name begins with, or None."""
    return SPLIT_NAMES.get(re.split("[-_. ]", stem)[0].lower())


def sample_indices(population: int, count: int) -> list[int]:
    """Return `count` random numbers below `population` without replacement, or all of them if there are fewer.

    The sample depends only on the arguments, not on global generators. It uses its own random stream: with the stream that shuffled
    the rows, the sample would undo the shuffle.
    """
    generator = np.random.default_rng((SAMPLE_STREAM, 0))
    return list(map(int, generator.choice(population, min(count, population), replace=False)))


def are_instructions(num_prompts: int, num_rows: int) -> bool:
    """Return whether so few prompts of so many rows are repeated instructions, whose rows do not belong together."""
    min_prompts = max(2, min(num_rows, MAX_DETECTION_ROWS) // MIN_ROWS_PER_INSTRUCTION)
    return num_rows > 1 and num_prompts < min_prompts
