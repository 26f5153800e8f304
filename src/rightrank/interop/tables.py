"""Groups the rows of a results table by training and validates every cell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rightrank.data.files import UnreadableError, is_text, kind_of, parse_json
from rightrank.data.rows import FILE_TYPES, Row, read_rows
from rightrank.interop.columns import Columns, direction_of, identify_columns
from rightrank.interop.importers import import_rows
from rightrank.schema.decision import Result, ResultsTable
from rightrank.schema.errors import DataError, ResultsError, quoted
from rightrank.schema.metrics import unknown_direction
from rightrank.schema.trials import MAX_WHOLE

FAILED_STATUS = {"failed", "crashed", "killed", "error", "fail", "diverged", "oom", "pruned"}
UNFINISHED_STATUS = {"running", "unfinished", "in_progress", "scheduled", "pending", "waiting", "queued", "preempting"}
MAX_RANK = 2**20
MIN_NUMBER = 1e-30  # smaller magnitudes are read as 0, before they become subnormal
MAX_NUMBER = 1e12  # a larger held-out value is a mistake, and its square loses precision

Key = tuple[int, float, int]  # rank, learning rate, seed


@dataclass(slots=True)
class TrainingRows:
    where: str
    trial: str
    by_example: dict[str, tuple[float, float, str]] = field(default_factory=dict)  # value, weight, where
    by_step: dict[int, tuple[float, str]] = field(default_factory=dict)
    std: float | None = None
    std_seeds: int = 1
    train_value: float | None = None
    seconds: float | None = None
    others: dict[str, float] = field(default_factory=dict)


def gather(
    rows: Iterable[Row], columns: Columns, metric: str
) -> tuple[dict[Key, TrainingRows], list[Result], list[str]]:
    """`(rows by training, trainings without a result, notes on what was left out)`."""
    trainings: dict[Key, TrainingRows] = {}
    empty: dict[Key, Row] = {}
    running: set[Key] = set()
    rankless = repeated = 0
    positive = "perplexity" in metric.lower() or metric.lower() == "ppl"
    for row in rows:
        if is_blank(row.fields.get(columns.by_name["rank"])):
            rankless += 1
            continue
        key = _key(row, columns)
        status = str(row.fields.get(columns.get("status") or "", "")).strip().lower()
        if status in UNFINISHED_STATUS:  # its last value is one part of the way
            running.add(key)
            continue
        value = None if status in FAILED_STATUS else _number(row, columns.value)
        if value is None:
            empty.setdefault(key, row)
            continue
        if positive and value <= 0:
            raise ResultsError(f"{row.where}: a perplexity of {value:g} is not possible; perplexities are above 0")
        training = trainings.setdefault(
            key, TrainingRows(row.where, str(row.fields.get(columns.get("trial") or "", "") or row.where))
        )
        repeated += _take(training, row, key, value, columns)
    missing = [
        Result(trial_id=row.where, rank=key[0], learning_rate=key[1], seed=key[2], value=None)
        for key, row in empty.items()
        if key not in trainings
    ]
    return trainings, missing, _notes(rankless, repeated, len(missing), len(running))


def _notes(rankless: int, repeated: int, missing: int, running: int) -> list[str]:
    counts = (
        (rankless, "row", "without a rank left out"),
        (repeated, "repeated row", "left out"),
        (missing, "training", "without a result"),
        (running, "unfinished training", "left out"),
    )
    return [f"{count} {noun}{'s' * (count != 1)} {what}" for count, noun, what in counts if count]


def _key(row: Row, columns: Columns) -> Key:
    rank = _integer(row, columns.by_name["rank"], "rank", "a positive integer, or 0 for the base")
    if rank > MAX_RANK:
        raise ResultsError(f"{row.where}: rank {rank} is not allowed: no adapter has more than {MAX_RANK:,}")
    learning_rate, seed = 0.0, 0
    column = columns.get("lr")
    if rank > 0 and column is not None and not is_blank(row.fields.get(column)):
        learning_rate = _number(row, column) or 0.0
        if learning_rate <= 0:
            raise ResultsError(
                f"{row.where}: learning rate {row.fields[column]!r} is not allowed: give a number above 0"
            )
    column = columns.get("seed")
    if column is not None and not is_blank(row.fields.get(column)):
        seed = _integer(row, column, "seed", "an integer from 0")
    return rank, learning_rate, seed


def _take(training: TrainingRows, row: Row, key: Key, value: float, columns: Columns) -> bool:
    """Add a row to its training; return whether it repeats another row."""
    item, step = columns.get("item"), columns.get("step")
    if item is not None and (step is None or not is_blank(row.fields.get(item))):
        name = str(row.fields.get(item))
        weight = _positive(row, columns.get("weight")) or 1.0
        first, _, where = training.by_example.setdefault(name, (value, weight, row.where))
        what = f", example {name}"
    else:
        at = 0 if step is None or is_blank(row.fields.get(step)) else _integer(row, step, "step", "an integer from 0")
        first, where = training.by_step.setdefault(at, (value, row.where))
        what = f", step {at}" if step else ""
    if where == row.where:
        _note_details(training, row, columns)
        return False
    if first != value:
        raise ResultsError(_conflict(key, row.where, where, what))
    return True


def _note_details(training: TrainingRows, row: Row, columns: Columns) -> None:
    """Store the row's further numbers; later rows override earlier ones."""
    std = _optional(row, columns.get("std"), strict=True)
    if std is not None and std < 0:
        raise ResultsError(f"{row.where}: std {std:g} is not allowed: a standard deviation is 0 or above")
    if std is not None:
        training.std, training.std_seeds = std, _seed_count(row, columns.get("std_seeds"))
    train, seconds = _optional(row, columns.get("train_value")), _optional(row, columns.get("seconds"))
    training.train_value = training.train_value if train is None else train
    training.seconds = training.seconds if seconds is None else seconds
    for other in columns.others:
        found = _number(row, other, strict=False)
        if found is not None:
            training.others[other] = found


def _optional(row: Row, column: str | None, strict: bool = False) -> float | None:
    return None if column is None else _number(row, column, strict)


def results_of(trainings: Mapping[Key, TrainingRows], columns: Columns) -> Iterator[Result]:
    """Yield one result per training, with the examples in one order.

    Raises:
        ResultsError: trainings were scored on different examples, or with different weights.
    """
    examples: list[str] = []
    tokens: list[float] = []
    for (rank, learning_rate, seed), training in trainings.items():
        values: list[float] = []
        weights: list[float] = []
        if training.by_example:
            examples = examples or sorted(training.by_example)
            _require_same_examples(training, rank, examples)
            values = [training.by_example[name][0] for name in examples]
            weights = [training.by_example[name][1] for name in examples]
            tokens = tokens or weights
            if weights != tokens:
                raise ResultsError(
                    f"{training.where}: rank {rank} has other token counts than the rank before for the same examples; "
                    "give each example the same count in every training"
                )
        steps = sorted(training.by_step)
        yield Result(
            trial_id=training.trial,
            rank=rank,
            learning_rate=learning_rate,
            seed=seed,
            value=_mean(values, weights) if values else training.by_step[steps[-1]][0],
            item_values=values,
            item_weights=weights if columns.get("weight") else [],
            std=training.std,
            std_seeds=training.std_seeds,
            train_value=training.train_value,
            seconds=training.seconds,
            steps=max(steps, default=0) or None,
            points=[(step, training.by_step[step][0]) for step in steps] if any(steps) else [],
            others=training.others,
        )


def _mean(values: list[float], weights: list[float]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def _require_same_examples(training: TrainingRows, rank: int, examples: list[str]) -> None:
    odd = sorted(set(training.by_example) ^ set(examples))
    if odd:
        raise ResultsError(
            f"{training.where}: rank {rank} is scored on other examples than the rank before ({len(odd)} differ, such as "
            f"{odd[0]}); score every training on the same examples"
        )


def _conflict(key: Key, here: str, there: str, what: str) -> str:
    learning_rate = f", lr {key[1]:g}" if key[1] else ""
    return (
        f"{here}: rank {key[0]}{learning_rate}, seed {key[2]}{what} occurs twice with different values (also {there}); "
        "add the column that distinguishes them (seed, lr or item), or remove one"
    )


def is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip() in ("", "-", "None", "null", "N/A"))


def _number(row: Row, column: str, strict: bool = True) -> float | None:
    """The finite number in a cell; None for an empty cell."""
    value: Any = row.fields.get(column)
    if is_blank(value):
        return None
    number = _float(value)
    if not strict and (number is None or not math.isfinite(number)):
        return None
    if number is None:
        raise ResultsError(f"{row.where}: {column} is {quoted(value, 40)}, not a number")
    if not math.isfinite(number):
        raise ResultsError(
            f"{row.where}: {column} is {number}; leave the cell empty where a training ended without a result"
        )
    if abs(number) > MAX_NUMBER:
        raise ResultsError(f"{row.where}: {column} is {number:g}; give a number up to {MAX_NUMBER:g}")
    return number if abs(number) >= MIN_NUMBER else 0.0


def _positive(row: Row, column: str | None) -> float | None:
    number = None if column is None else _number(row, column)
    if number is not None and number <= 0:
        raise ResultsError(f"{row.where}: {column} {number:g} is not allowed: give a number above 0")
    return number


def _seed_count(row: Row, column: str | None) -> int:
    """The number of seeds behind a stated deviation, 1 by default."""
    number = _positive(row, column) or 1.0
    if number != int(number):
        raise ResultsError(f"{row.where}: {column} {number:g} is not allowed: give a whole number from 1")
    return int(number)


def _integer(row: Row, column: str, name: str, allowed: str) -> int:
    value: Any = row.fields.get(column)
    number = None if isinstance(value, bool) else _float(value)
    if number is None or not number.is_integer() or not 0 <= number <= MAX_WHOLE:
        raise ResultsError(f"{row.where}: {name} {quoted(value, 40)} is not allowed: give {allowed}")
    return int(number)


def _float(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


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
