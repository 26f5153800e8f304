"""Read tables of results into columns: from text files, Parquet and Excel, folders of transformers' Trainer, data frames, and mappings in memory.

A column stores each distinct cell once, and for each row the index of its cell. So cells that recur are converted and compared once, and a
table of a million rows takes little time and memory.
"""

from __future__ import annotations

import csv
import json
import math
import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rightrank.data.files import (
    ROW_DECODER,
    UnreadableError,
    detect_path_kind,
    find_repeated_name,
    parse_json,
    read_json_object,
)
from rightrank.data.rows import detect_delimiter
from rightrank.schema.errors import MissingExtraError, ResultsError, quote_value, suggest_name

BLANK_TEXTS = {"", "-", "–", "—", "none", "null", "n/a", "na", "nan", "nat", "<na>"}  # texts of empty cells
MAX_NAMES = 12
Codes: TypeAlias = "NDArray[np.int64]"


@dataclass(frozen=True, slots=True)
class Column:
    """The cell of a row is `cells[codes[row]]`: a text, a number or None."""

    cells: list[Any]
    codes: Codes  # [rows]

    def select(self, rows: NDArray[Any]) -> Column:
        used, codes = np.unique(self.codes[rows], return_inverse=True)
        return Column([self.cells[code] for code in used.tolist()], codes)

    def test(self, is_true: Callable[[Any], bool]) -> NDArray[np.bool_]:
        return np.array([is_true(cell) for cell in self.cells], dtype=bool)[self.codes]

    def encode(self, convert: Callable[[Any], Any]) -> tuple[list[Any], Codes]:
        """Return the distinct values of the converted cells in order, and the index of each row's value."""
        values = [convert(cell) for cell in self.cells]
        distinct = sorted(set(values))
        codes = {value: code for code, value in enumerate(distinct)}
        return distinct, np.array([codes[value] for value in values])[self.codes]

    def parse_numbers(self) -> list[float | None]:
        """Convert the cells to numbers: NaN for blank cells, None for those that are no numbers."""
        return list(map(parse_number, self.cells))


@dataclass(frozen=True, slots=True)
class Table:
    """A table of results. `settings` are the columns that must not differ even if they contain numbers."""

    name: str
    columns: Mapping[str, Column]
    prefixes: Column  # the beginning of each row's origin
    numbers: Codes  # [rows] the number that ends it
    settings: frozenset[str] = frozenset()

    def describe_row(self, row: int) -> str:
        """Return where a row comes from, such as `runs.csv:3`."""
        return f"{self.prefixes.cells[self.prefixes.codes[row]]}{self.numbers[row]}"

    def get_cell(self, name: str, row: int) -> Any:
        column = self.columns[name]
        return column.cells[column.codes[row]]

    def select(self, rows: NDArray[Any]) -> Table:
        columns = {name: column.select(rows) for name, column in self.columns.items()}
        return replace(self, columns=columns, prefixes=self.prefixes.select(rows), numbers=self.numbers[rows])

    def ignore(self, names: Iterable[str]) -> Table:
        """Return the table without some columns.

        Raises:
            ResultsError: there is no such column.
        """
        removed = set(names)
        for name in removed:
            self.require_column(name, "--ignore")
        return replace(self, columns={name: column for name, column in self.columns.items() if name not in removed})

    def keep_rows_where(self, values: Mapping[str, object]) -> Table:
        """Return the rows that have the given value in each of the given columns.

        Raises:
            ResultsError: there is no such column, or no row with these values.
        """
        mask = np.ones(len(self.numbers), dtype=bool)
        for name, value in values.items():
            self.require_column(name, "--where")
            texts, codes = self.columns[name].encode(format_cell)
            mask &= np.array([text == format_cell(value) for text in texts])[codes]
            if not mask.any():
                allowed = format_names([quote_value(text, 40) for text in texts])
                raise ResultsError(f"--where {name}={value}: {self.name} has no such row; the values are {allowed}")
        return self.select(mask) if values else self

    def require_column(self, name: str, option: str) -> None:
        if name not in self.columns:
            raise ResultsError(f"{option} {name}: {self.name} has no column {name!r}{suggest_name(name, self.columns)}")


def is_blank(cell: Any) -> bool:
    """Return whether a cell is empty, NaN, or contains a placeholder such as `n/a`."""
    return cell is None or cell != cell or (isinstance(cell, str) and cell.strip().lower() in BLANK_TEXTS)


def parse_number(cell: Any) -> float | None:
    """Convert a cell to a number: NaN for a blank one, None for one that is no number."""
    try:
        return None if isinstance(cell, str) and "_" in cell else float(cell)
    except (TypeError, ValueError):
        return math.nan if is_blank(cell) else None
    except OverflowError:  # an integer with hundreds of digits
        return None


def format_cell(cell: Any) -> str:
    """Return the text of a cell; empty for a blank one. Equal numbers have equal texts."""
    if is_blank(cell):
        return ""
    number = parse_number(cell)
    return str(cell).strip() if number is None else repr(number)


def format_names(names: Sequence[str]) -> str:
    text = ", ".join(names[:MAX_NAMES])
    return f"{text}, … ({len(names)} in all)" if len(names) > MAX_NAMES else text or "none"


FILE_TYPES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".xlsx")
CHUNK_ROWS = 1000  # fits into the cache of a processor
MAX_DEPTH = 8  # of nested mappings whose values become columns; deeper ones are texts
STATE_FILE = "trainer_state.json"
CONFIG_FILE = "adapter_config.json"
STATE_SETTINGS = ("max_steps", "num_train_epochs", "train_batch_size")
_SEED = re.compile(r"seed[-_=]?(\d+)", re.IGNORECASE)
# A row: the beginning of its origin and the number that ends it, the names of its columns, and its cells.
Row: TypeAlias = tuple[str, int, Sequence[Any], Sequence[Any]]


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
        return _build_table(str(path), _read_file(path))
    if states := sorted(path.rglob(STATE_FILE)):
        return _build_table(str(path), *_read_trainer_outputs(path, states))
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in FILE_TYPES and file.is_file())
    if not files:
        raise ResultsError(
            f"{path}: the folder contains no results in a known format; give a run folder, trainings with {STATE_FILE}, or "
            f"a folder of files ending in {', '.join(FILE_TYPES)}"
        )
    return _build_table(str(path), chain.from_iterable(map(_read_file, files)))


class _ColumnBuilder:
    """Collects the distinct cells of a column, and the index of each row's cell."""

    def __init__(self) -> None:
        self._codes_by_cell: defaultdict[Any, int] = defaultdict()
        self._codes_by_cell.default_factory = self._codes_by_cell.__len__
        self._codes: list[Codes] = []
        self.num_rows = 0

    def extend(self, cells: Sequence[Any]) -> None:
        if not set(map(type, cells)) <= {str, int, float, NoneType}:
            cells = [_simplify_cell(cell) for cell in cells]
        self._codes.append(np.fromiter(map(self._codes_by_cell.__getitem__, cells), np.int64, len(cells)))
        self.num_rows += len(cells)

    def build_column(self) -> Column:
        return Column(list(self._codes_by_cell), np.concatenate(self._codes))


def _simplify_cell(cell: Any) -> Any:
    """Convert a cell to a number, a text or None. Truth values and lists are settings, and therefore texts."""
    if isinstance(cell, np.generic):
        cell = cell.item()
    if cell is None or type(cell) in (str, int, float):
        return cell
    return json.dumps(cell, sort_keys=True, default=str) if isinstance(cell, list | tuple | Mapping) else str(cell)


def _build_table(name: str, rows: Iterable[Row], settings: frozenset[str] = frozenset()) -> Table:
    """Collect rows as columns. A column that a row does not have is blank in it."""
    builders: defaultdict[str, _ColumnBuilder] = defaultdict(_ColumnBuilder)
    prefixes, numbers = _ColumnBuilder(), array("q")
    for (prefix, titles), group in groupby(rows, key=itemgetter(0, 2)):
        names = [str(title).strip() for title in titles]
        if (repeated := find_repeated_name(names)) is not None:
            raise ResultsError(f"{name}: two columns are named {repeated!r}; rename one of them, or remove it")
        while chunk := list(islice(group, CHUNK_ROWS)):
            for title, cells in zip(names, zip(*(row[3] for row in chunk), strict=True), strict=True):
                builders[title].extend([None] * (len(numbers) - builders[title].num_rows))
                builders[title].extend(cells)
            numbers.extend(row[1] for row in chunk)
            prefixes.extend([prefix] * len(chunk))
    if not numbers:
        raise ResultsError(f"{name}: no rows; give a header and one row for each training")
    for builder in builders.values():
        builder.extend([None] * (len(numbers) - builder.num_rows))
    columns = {title: builder.build_column() for title, builder in builders.items()}
    return Table(name, columns, prefixes.build_column(), np.frombuffer(numbers, dtype=np.int64), settings)


def _read_file(path: Path) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix not in FILE_TYPES:
        raise ResultsError(
            f"{path}: files of type {suffix or '(no extension)'!r} are not supported; give a file ending in {', '.join(FILE_TYPES)}"
        )
    try:
        if suffix in (".parquet", ".xlsx"):
            yield from _read_with_pandas(path)
        elif suffix in (".csv", ".tsv"):
            yield from _read_csv(path)
        else:
            yield from _read_json(path)
    except UnicodeDecodeError as error:
        raise ResultsError(
            f"{path}: not UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8"
        ) from None
    except OSError as error:
        raise ResultsError(f"{path}: can't read it ({error.strerror or error}); give a file that can be read") from None


def _read_csv(path: Path) -> Iterator[Row]:
    delimiter, prefix = detect_delimiter(path), f"{path}:"
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            for cells in reader:
                if len(cells) == len(names):
                    yield prefix, reader.line_num, names, cells
                elif cells:
                    raise ResultsError(
                        f"{prefix}{reader.line_num}: {len(cells)} cells, but the header has {len(names)} columns; quote cells that "
                        f"contain {delimiter!r}, and write empty cells too"
                    )
        except csv.Error as error:
            raise ResultsError(f"{prefix}{reader.line_num}: not {path.suffix[1:].upper()} ({error})") from None


def _read_json(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        is_list = lines.read(64).lstrip().startswith("[")
    with path.open(encoding="utf-8-sig") as lines:
        if is_list:
            yield from _flatten_rows(f"{path}: entry ", enumerate(_parse_json(path, lines.read()), start=1))
        else:
            rows = (
                (number, _parse_json(path, line, number)) for number, line in enumerate(lines, start=1) if line.strip()
            )
            yield from _flatten_rows(f"{path}:", rows)


def _parse_json(path: Path, text: str, first_line: int = 1) -> Any:
    try:
        return parse_json(text, ROW_DECODER)
    except UnreadableError as error:
        raise ResultsError(
            f"{path}:{first_line + error.line - 1}: not a row in JSON ({error}); give a list of objects, or one object a line"
        ) from None


def _flatten_rows(prefix: str, entries: Iterable[tuple[int, Any]]) -> Iterator[Row]:
    """Read mappings. The values of nested mappings become columns with dotted names."""
    for number, fields in entries:
        if not isinstance(fields, Mapping):
            raise ResultsError(
                f"{prefix}{number}: got {type(fields).__name__}; give a mapping with `rank` and a held-out metric"
            )
        pairs = list(_flatten(fields))
        yield prefix, number, [name for name, _ in pairs], [value for _, value in pairs]


def _flatten(fields: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping) and depth < MAX_DEPTH:
            yield from _flatten(value, f"{prefix}{name}.", depth + 1)
        else:
            yield f"{prefix}{name}", value


def _read_memory(source: Any) -> Iterator[Row]:
    is_series = hasattr(source, "iloc") and not hasattr(source, "columns")
    if is_series or not isinstance(source, Iterable):
        raise ResultsError(
            f"results: got {type(source).__name__}; give a file, a run folder, a data frame, or a list of mappings with `rank` and a "
            "held-out metric"
        )
    if hasattr(source, "iloc"):
        return _read_frame(source, "row ")
    rows = source.to_dicts() if hasattr(source, "to_dicts") else source  # a data frame of polars
    return _flatten_rows("row ", enumerate(rows, start=1))


def _read_frame(frame: Any, prefix: str) -> Iterator[Row]:
    """Read a data frame of pandas. An index with a name, or of texts, is a column."""
    if any(name is not None for name in frame.index.names) or frame.index.inferred_type == "string":
        frame = frame.reset_index(allow_duplicates=True)
    names = list(frame.columns)
    columns = [frame.iloc[:, number].tolist() for number in range(len(names))]
    for number, cells in enumerate(zip(*columns, strict=True), start=1):
        yield prefix, number, names, cells


def _read_with_pandas(path: Path) -> Iterator[Row]:
    try:
        import pandas

        # pandas renames the second of two columns with one name, so the header of a sheet is read as a row.
        if path.suffix.lower() == ".xlsx":
            sheet = pandas.read_excel(path, header=None, dtype=object)
            frame = sheet.iloc[1:].reset_index(drop=True).set_axis(sheet.iloc[0].tolist(), axis=1)
        else:
            frame = pandas.read_parquet(path)
        yield from _read_frame(frame, f"{path}: row ")
    except ImportError as error:
        raise MissingExtraError(f"{path}: {error}; install it, or save the table as CSV") from None
    except (
        ValueError,
        OverflowError,
        KeyError,
    ) as error:  # raised for damaged files, and for dates beyond those of Python
        raise ResultsError(f"{path}: not a table that pandas can read ({error}); write it again, or as CSV") from None


def _read_trainer_outputs(root: Path, states: Sequence[Path]) -> tuple[list[Row], frozenset[str]]:
    """Read the evaluations of the trainings under a folder of transformers' Trainer.

    The rank and the other settings of an adapter come from its `adapter_config.json`, the learning rate is the highest one in the log,
    and the seed is that in the folder's name (`seed0`). Of several checkpoints, the last one has the complete log.

    Args:
        states: the `trainer_state.json` files under `root`.

    Returns:
        A row for each evaluation, and the columns that hold the adapters' settings.

    Raises:
        ResultsError: a file that is not JSON, a training without an adapter's configuration, or no evaluation.
    """
    last_states: dict[Path, tuple[int, Path, dict[str, Any]]] = {}
    for path in states:
        training = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
        state = _read_object(path)
        step = state.get("global_step")
        candidate = (step if isinstance(step, int) else 0, path, state)
        last_states[training] = max(last_states.get(training, candidate), candidate, key=lambda entry: entry[:2])
    rows: list[Row] = []
    settings: set[str] = set()
    for training, (_, path, state) in last_states.items():
        config = _read_adapter_config(path, training)
        fields = {"rank": config.pop("r", None), **config, **_find_seed(training, root)}
        fields |= {name: state[name] for name in STATE_SETTINGS if name in state}
        evaluations = _list_evaluations(state, fields)
        rows += [(f"{path}: step ", values["step"], list(values), list(values.values())) for values in evaluations]
        settings |= config.keys()
    if not rows:
        raise ResultsError(
            f"{root}: the {STATE_FILE} files contain no evaluation (eval_loss); train with eval_strategy set"
        )
    return rows, frozenset(settings)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except UnreadableError as error:
        raise ResultsError(f"{path}: this is not JSON ({error}); restore the file, or remove its folder") from None


def _read_adapter_config(state: Path, training: Path) -> dict[str, Any]:
    """Read the configuration beside the state, in the folder of the training, or in one of its checkpoints."""
    folders = [state.parent, training, *sorted(training.glob("checkpoint-*"))]
    path = next((folder / CONFIG_FILE for folder in folders if (folder / CONFIG_FILE).is_file()), None)
    if path is None:
        raise ResultsError(
            f"{state}: there is no {CONFIG_FILE} in its folder, so the rank is not known; save the adapter there, or give a table "
            "with a column rank"
        )
    # PEFT writes sets as lists in any order.
    return {
        name: sorted(value, key=repr) if isinstance(value, list) else value
        for name, value in _read_object(path).items()
    }


def _find_seed(training: Path, root: Path) -> dict[str, str]:
    seeds = set(_SEED.findall("/".join(training.relative_to(root).parts) or training.name))
    if len(seeds) > 1:
        raise ResultsError(
            f"{training}: its name states the seeds {', '.join(sorted(seeds))}; name the folder so that it states one (seed0)"
        )
    return {"seed": seeds.pop()} if seeds else {}


def _list_evaluations(state: Mapping[str, Any], fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the steps of the log with a held-out value, each with its values, the last training loss before it, and `fields`."""
    log = state.get("log_history")
    entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    rates = [rate for entry in entries if isinstance(rate := entry.get("learning_rate"), int | float)]
    values = {**fields, "lr": max(rates)} if rates else {**fields}
    evaluations = []
    for entry in entries:
        values |= {"train_loss": entry["loss"]} if "loss" in entry else {}
        held_out = {name: value for name, value in entry.items() if name.startswith("eval_")}
        if held_out and isinstance(entry.get("step"), int):
            evaluations.append({"step": entry["step"], **values, **held_out})
    return evaluations
