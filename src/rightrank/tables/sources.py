"""Read result tables into columns: from CSV, TSV, JSON, JSON lines, Parquet and Excel files, data frames, and mappings in memory."""

from __future__ import annotations

import csv
import json
import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, compress, islice
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias

import numpy as np

from rightrank.data.files import UnreadableError, detect_path_kind, parse_json
from rightrank.data.rows import detect_delimiter
from rightrank.schema.errors import MissingExtraError, ResultsError
from rightrank.tables.columns import Codes, Column, Table
from rightrank.tables.trainer_outputs import STATE_FILE, read_trainer_outputs

FILE_TYPES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".xlsx")
CHUNK_ROWS = 1000  # fits into the cache of a processor
MAX_DEPTH = 8  # of nested mappings whose values become columns; deeper ones are texts
MAX_CELL_CHARACTERS = 2**24
LINE_BREAK = re.compile(r"\r\n|\r|\n")
# Rows with the same columns: the beginning of their origin, the names, the cells by column, and the number that ends each row's origin.
Chunk: TypeAlias = tuple[str, Sequence[str], Sequence[Sequence[Any]], Sequence[int]]


def read_table(source: Any) -> Table:
    """Read a file, a folder of files, a folder of transformers' Trainer, a data frame, or mappings in memory.

    Raises:
        ResultsError: no such file, no rows, a row that cannot be read, or two columns with one name.
    """
    if not isinstance(source, str | Path):
        return _build_table("results", _read_memory(source))
    path = Path(source)
    kind = detect_path_kind(path)
    if kind not in ("file", "folder"):
        raise ResultsError(f"{path}: no such file or folder; give a CSV or JSONL file of results, or a run folder")
    if kind == "file":
        return _read_files(path, [path])
    if states := sorted(path.rglob(STATE_FILE)):
        outputs, settings = read_trainer_outputs(path, states)
        chunks = (chunk for prefix, rows in outputs for chunk in _collect_rows(prefix, rows))
        return _build_table(str(path), chunks, settings)
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in FILE_TYPES and file.is_file())
    if not files:
        raise ResultsError(
            f"{path}: the folder contains no results in a known format; give a run folder, trainings with {STATE_FILE}, or "
            f"a folder of files ending in {', '.join(FILE_TYPES)}"
        )
    return _read_files(path, files)


def _read_files(source: Path, files: Sequence[Path]) -> Table:
    return _build_table(str(source), (chunk for file in files for chunk in _read_file(file)))


class _ColumnBuilder:
    """Collects the cells of a column: the distinct ones and an index for each row, or all of them where most are distinct."""

    def __init__(self, first_cells: Sequence[Any]) -> None:
        self._codes_by_cell: defaultdict[Any, int] = defaultdict()
        self._codes_by_cell.default_factory = self._codes_by_cell.__len__
        self._codes: list[Codes] = []
        self._cells: list[Any] = []
        self._has_distinct_cells = len(set(map(str, first_cells))) > len(first_cells) / 2
        self.num_rows = 0

    def extend(self, cells: Sequence[Any]) -> None:
        if not set(map(type, cells)) <= {str, int, float, NoneType}:
            cells = [_simplify_cell(cell) for cell in cells]
        if self._has_distinct_cells:
            self._cells.extend(cells)
        else:
            self._codes.append(np.fromiter(map(self._codes_by_cell.__getitem__, cells), np.int64, len(cells)))
        self.num_rows += len(cells)

    def build_column(self) -> Column:
        if self._has_distinct_cells:
            return Column(self._cells, np.arange(self.num_rows))
        return Column(list(self._codes_by_cell), np.concatenate(self._codes))


def _simplify_cell(cell: Any) -> Any:
    """Convert a cell to a number, a text or None. Truth values and lists are settings, and therefore texts."""
    if cell is None or type(cell) in (str, int, float):
        return cell
    if isinstance(cell, bool | np.bool_):
        return str(bool(cell))
    if isinstance(cell, np.generic):
        return _simplify_cell(cell.item())
    return json.dumps(cell, sort_keys=True, default=str) if isinstance(cell, list | tuple | Mapping) else str(cell)


def _build_table(name: str, chunks: Iterable[Chunk], settings: frozenset[str] = frozenset()) -> Table:
    """Collect chunks of rows as columns. A column that a chunk does not have is blank in its rows."""
    builders: dict[str, _ColumnBuilder] = {}
    prefixes, numbers = _ColumnBuilder([name, name]), array("q")
    for prefix, titles, columns, row_numbers in chunks:
        names = [str(title).strip() for title in titles]
        if len(set(names)) < len(names):
            repeated = next(title for title in names if names.count(title) > 1)
            raise ResultsError(f"{name}: two columns are named {repeated!r}; rename one of them, or remove it")
        for title, cells in zip(names, columns, strict=True):
            if title not in builders:
                builders[title] = _ColumnBuilder(cells)
                builders[title].extend([None] * len(numbers))
            builders[title].extend(cells)
        prefixes.extend([prefix] * len(row_numbers))
        numbers.extend(row_numbers)
        for builder in builders.values():
            builder.extend([None] * (len(numbers) - builder.num_rows))
    if not numbers:
        raise ResultsError(f"{name}: no rows; give a header and one row for each training")
    titled_columns = {title: builder.build_column() for title, builder in builders.items()}
    return Table(name, titled_columns, prefixes.build_column(), np.frombuffer(numbers, dtype=np.int64), settings)


def _read_file(path: Path) -> Iterator[Chunk]:
    suffix = path.suffix.lower()
    if suffix not in FILE_TYPES:
        raise ResultsError(
            f"{path}: files of type {suffix or '(no extension)'!r} are not supported; give a file ending in {', '.join(FILE_TYPES)}"
        )
    if path.stat().st_size == 0:
        raise ResultsError(f"{path}: the file is empty; give a header and one row for each training")
    try:
        if suffix in (".parquet", ".xlsx"):
            yield from _read_with_pandas(path)
        elif suffix in (".csv", ".tsv"):
            yield from _read_csv(path)
        else:
            yield from _collect_rows(*_read_json(path))
    except UnicodeDecodeError as error:
        raise ResultsError(
            f"{path}: not UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8"
        ) from None
    except OSError as error:
        raise ResultsError(f"{path}: can't read it ({error.strerror or error}); give a file that can be read") from None


def _read_csv(path: Path) -> Iterator[Chunk]:
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    delimiter = detect_delimiter(path)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            while True:
                previous_line = reader.line_num
                rows = list(islice(reader, CHUNK_ROWS))
                numbers = _number_lines(rows, previous_line, reader.line_num)
                if not {*map(len, rows)} <= {0, len(names)}:
                    is_wrong = (len(cells) not in (0, len(names)) for cells in rows)
                    cells, number = next(compress(zip(rows, numbers, strict=True), is_wrong))
                    raise ResultsError(
                        f"{path}:{number}: {len(cells)} cells, but the header has {len(names)} columns; quote cells that "
                        f"contain {delimiter!r}, and write empty cells too"
                    )
                if not all(rows):  # blank lines
                    numbers = [number for number, cells in zip(numbers, rows, strict=True) if cells]
                    rows = [cells for cells in rows if cells]
                yield f"{path}:", names, list(zip(*rows, strict=True)) or [()] * len(names), numbers
                if reader.line_num == previous_line:
                    return
        except csv.Error as error:
            raise ResultsError(f"{path}:{reader.line_num}: not {path.suffix[1:].upper()} ({error})") from None


def _number_lines(rows: Sequence[Sequence[str]], previous_line: int, last_line: int) -> Sequence[int]:
    """Return the number of the line that ends each row. A row has several lines if its cells contain line breaks."""
    if last_line - previous_line == len(rows):
        return range(previous_line + 1, last_line + 1)
    num_lines = (1 + sum(len(LINE_BREAK.findall(cell)) for cell in cells) for cells in rows)
    return list(accumulate(num_lines, initial=previous_line))[1:]


class _Pairs(list[tuple[str, Any]]):
    """The names and values of a JSON object. A mapping would drop the first of two values with one name."""


_DECODER = json.JSONDecoder(object_pairs_hook=_Pairs)


def _read_json(path: Path) -> tuple[str, Iterator[tuple[int, Any]]]:
    """Return the beginning of each row's origin, and the rows of a JSON list or of JSON lines with their numbers."""
    with path.open(encoding="utf-8-sig") as file:
        is_list = file.read(64).lstrip().startswith("[")
    if not is_list:
        return f"{path}:", _read_json_lines(path)
    try:
        entries = parse_json(path.read_text(encoding="utf-8-sig"), _DECODER)
    except UnreadableError as error:
        raise ResultsError(f"{path}:{error.line}: not a table in JSON ({error}); give a list of objects") from None
    return f"{path}: entry ", enumerate(entries, start=1)


def _read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, parse_json(line, _DECODER)
                except UnreadableError as error:
                    raise ResultsError(
                        f"{path}:{number}: not a row in JSON ({error}); give one JSON object a line"
                    ) from None


def _collect_rows(prefix: str, rows: Iterable[tuple[int, Any]]) -> Iterator[Chunk]:
    """Collect mappings with the same names into chunks. The values of nested mappings become columns with dotted names."""
    names: tuple[str, ...] = ()
    cells: list[tuple[Any, ...]] = []
    numbers: list[int] = []
    for number, fields in rows:
        if not isinstance(fields, _Pairs | Mapping):
            raise ResultsError(
                f"{prefix}{number}: got a {type(fields).__name__}; give a mapping with `rank` and a held-out metric"
            )
        row_names, row_cells = _transpose(fields)
        if any(issubclass(kind, _Pairs | Mapping) for kind in set(map(type, row_cells))):
            row_names, row_cells = _transpose(_Pairs(_flatten(fields)))
        if cells and (row_names != names or len(cells) == CHUNK_ROWS):
            yield prefix, names, list(zip(*cells, strict=True)), numbers
            cells, numbers = [], []
        names = row_names
        cells.append(row_cells)
        numbers.append(number)
    if cells:
        yield prefix, names, list(zip(*cells, strict=True)), numbers


def _transpose(fields: _Pairs | Mapping[Any, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return `(names, values)` of a mapping."""
    if isinstance(fields, Mapping):
        return tuple(fields), tuple(fields.values())
    return tuple(name for name, _ in fields), tuple(value for _, value in fields)


def _flatten(fields: _Pairs | Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    for name, value in zip(*_transpose(fields), strict=True):
        if isinstance(value, _Pairs | Mapping) and depth < MAX_DEPTH:
            yield from _flatten(value, f"{prefix}{name}.", depth + 1)
        else:
            yield f"{prefix}{name}", value


def _read_memory(source: Any) -> Iterator[Chunk]:
    if hasattr(source, "iloc"):
        yield _read_frame(source, "row ")
    else:
        rows = source.to_dicts() if hasattr(source, "to_dicts") else source  # a data frame of polars
        yield from _collect_rows("row ", enumerate(rows, start=1))


def _read_frame(frame: Any, prefix: str) -> Chunk:
    """Read a data frame of pandas. An index with a name, or of texts, is a column."""
    if any(name is not None for name in frame.index.names) or frame.index.inferred_type == "string":
        frame = frame.reset_index(allow_duplicates=True)
    columns = [frame.iloc[:, number].tolist() for number in range(frame.shape[1])]
    return prefix, list(frame.columns), columns, range(1, len(frame) + 1)


def _read_with_pandas(path: Path) -> Iterator[Chunk]:
    try:
        import pandas

        # pandas renames the second of two columns with one name, so the header of a sheet is read as a row.
        if path.suffix.lower() == ".xlsx":
            sheet = pandas.read_excel(path, header=None, dtype=object)
            yield f"{path}: row ", sheet.iloc[0].tolist(), *_read_frame(sheet.iloc[1:].reset_index(drop=True), "")[2:]
        else:
            yield _read_frame(pandas.read_parquet(path), f"{path}: row ")
    except ImportError as error:
        raise MissingExtraError(f"{path}: {error}; install it, or save the table as CSV") from None
    except (
        ValueError,
        OverflowError,
        KeyError,
    ) as error:  # raised for damaged files, and for dates beyond those of Python
        raise ResultsError(f"{path}: not a table that pandas can read ({error}); write it again, or as CSV") from None
