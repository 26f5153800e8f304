"""Tables of finished trainings that others ran, read with suspicion: every complaint names file and row."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rightrank.errors import DataError, ResultsError
from rightrank.io.columns import Columns, DirectionOf, understand
from rightrank.io.importers import import_rows
from rightrank.io.rows import Row, read_rows
from rightrank.records import Result, Results

LARGEST_FILE = 200 * 2**20  # bytes; 5 million rows
MOST_DEPTH = 8
LARGEST_NUMBER = 1e12  # beyond it a held-out value is a mistake, and squares lose their meaning
FAILED = {"failed", "crashed", "killed", "error", "fail", "diverged", "oom", "pruned"}

Key = tuple[int, float, int]  # rank, learning rate, seed


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user said of the table."""

    metric: str | None = None
    higher_is_better: bool | None = None
    mapping: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Run:
    """The rows of one training, as they come in."""

    where: str
    trial: str
    by_item: dict[str, tuple[float, float, str]] = field(default_factory=dict)  # value, weight, where
    by_step: dict[int, tuple[float, str]] = field(default_factory=dict)
    std: float | None = None
    std_seeds: int = 1
    train_value: float | None = None
    seconds: float | None = None
    others: dict[str, float] = field(default_factory=dict)


def read_results(source: Path, asked: Asked, direction_of: DirectionOf) -> Results:
    """The table in a file or folder.

    Args:
        source: CSV, TSV, JSONL, JSON, Parquet, an Optuna or MLflow SQLite file, or a folder that an importer knows.
        asked: metric, direction and columns as the user gave them.
        direction_of: name of a metric → whether higher is better, None where the name doesn't tell.

    Raises:
        ResultsError: anything that can't be used, with file and row.
    """
    rows = [Row(dict(_flat(row.fields)), row.where) for row in _raw_rows(source)]
    return results_of_rows(rows, asked, direction_of, str(source))


def results_of_rows(rows: list[Row], asked: Asked, direction_of: DirectionOf, where: str) -> Results:
    """The table of rows that are mappings already."""
    names = list(dict.fromkeys(name for row in rows for name in row.fields))
    columns = understand(names, asked.metric, asked.mapping, direction_of, where)
    rows, metric = _one_metric(rows, columns, asked.metric, where)
    higher, why = _direction(rows, columns, metric, asked.higher_is_better, direction_of)
    understood = [f"{name} from column {column}" for name, column in columns.by_name.items() if name != column]
    understood.append(f"value from column {columns.value}: {'higher' if higher else 'lower'} is better ({why})")
    runs, missing, notes = _runs(rows, columns, metric)
    results = [*_results(runs, columns), *missing]
    _require_comparable(results, runs, where)
    return Results(metric=metric, higher_is_better=higher, results=results, understood=understood + notes)


def rows_of_mappings(mappings: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows of a table in memory."""
    rows = []
    for number, fields in enumerate(mappings, start=1):
        if not isinstance(fields, Mapping):
            raise ResultsError(f"row {number}: got a {type(fields).__name__}; give a mapping with `rank` and `value`")
        rows.append(Row(dict(_flat(fields)), f"row {number}"))
    if not rows:
        raise ResultsError("no rows: give one mapping for each training")
    return rows


def _raw_rows(source: Path) -> list[Row]:
    if not source.exists():
        raise ResultsError(f"{source}: no such file or folder; give a CSV or JSONL file of results, or a run folder")
    imported = import_rows(source)
    if imported is not None:
        return imported
    if source.is_file():
        size = source.stat().st_size
        if size == 0:
            raise ResultsError(f"{source}: the file is empty; give a header and one row for each training")
        if size > LARGEST_FILE:
            raise ResultsError(
                f"{source}: {size / 2**20:,.0f} MiB is too large for a table of results (limit {LARGEST_FILE // 2**20} MiB); "
                "give one row for each training, or for each training and item"
            )
    try:
        rows = [row for split in read_rows(source).values() for row in split]
    except DataError as error:
        raise ResultsError(str(error)) from None
    if not rows:
        raise ResultsError(f"{source}: a header and no rows; give one row for each training")
    return rows


def _flat(fields: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Nested mappings, and cells that hold a JSON object, as dotted names."""
    for name, value in fields.items():
        if isinstance(value, str) and value[:1] == "{" and value[-1:] == "}":
            value = _object(value)
        if isinstance(value, Mapping) and depth < MOST_DEPTH:
            yield from _flat(value, f"{prefix}{name}.", depth + 1)
        else:
            yield f"{prefix}{name}", value


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return text


def _one_metric(rows: list[Row], columns: Columns, asked: str | None, where: str) -> tuple[list[Row], str]:
    """The rows of one metric, where a column names several."""
    column = columns.get("metric")
    if column is None or column == columns.value:
        return rows, columns.metric
    names = sorted({str(row.fields.get(column)) for row in rows if not _blank(row.fields.get(column))})
    if asked in names:
        return [row for row in rows if row.fields.get(column) == asked], str(asked)
    if len(names) > 1:
        raise ResultsError(f"{where}: column {column} holds several metrics ({', '.join(names)}); choose one: --metric")
    return rows, names[0] if names else columns.metric


def _direction(
    rows: list[Row], columns: Columns, metric: str, asked: bool | None, direction_of: DirectionOf
) -> tuple[bool, str]:
    """`(higher is better, why)`."""
    if asked is not None:
        return asked, "as you said"
    column = columns.get("higher_is_better")
    if column is not None:
        said = {str(row.fields.get(column)).strip().lower() for row in rows if not _blank(row.fields.get(column))}
        if len(said) > 1:
            raise ResultsError(f"{rows[0].where}: column {column} says both; give one direction, or --higher-is-better")
        if said:
            return said.pop() in ("true", "1", "1.0", "yes"), f"column {column}"
    for name in (metric, columns.value):
        told = direction_of(name)
        if told is not None:
            return bool(told), f"from its name, {name}"
    return False, "nothing says otherwise; if not, give --higher-is-better"


def _runs(rows: Iterable[Row], columns: Columns, metric: str) -> tuple[dict[Key, _Run], list[Result], list[str]]:
    """Rows gathered by training; trainings without a result; what was left out."""
    runs: dict[Key, _Run] = {}
    empty: dict[Key, Row] = {}
    rankless = repeated = 0
    positive = "perplexity" in metric.lower() or metric.lower() == "ppl"
    for row in rows:
        if _blank(row.fields.get(columns.by_name["rank"])):
            rankless += 1
            continue
        key = _key(row, columns)
        failed = str(row.fields.get(columns.get("status") or "", "")).strip().lower() in FAILED
        value = None if failed else _number(row, columns.value)
        if value is None:
            empty.setdefault(key, row)
            continue
        if positive and value <= 0:
            raise ResultsError(f"{row.where}: a perplexity of {value:g} is not possible; perplexities are above 0")
        run = runs.setdefault(key, _Run(row.where, str(row.fields.get(columns.get("trial") or "", "") or row.where)))
        repeated += _take(run, row, key, value, columns)
    missing = [
        Result(trial_id=row.where, rank=key[0], learning_rate=key[1], seed=key[2], value=None)
        for key, row in empty.items()
        if key not in runs
    ]
    notes = [f"{rankless} rows without a rank left out"] * bool(rankless)
    notes += [f"{repeated} rows that repeat another left out"] * bool(repeated)
    notes += [f"{len(missing)} trainings without a result"] * bool(missing)
    return runs, missing, notes


def _key(row: Row, columns: Columns) -> Key:
    rank = _integer(row, columns.by_name["rank"], "rank", "a positive integer, or 0 for the base")
    rate, seed = 0.0, 0
    column = columns.get("lr")
    if rank > 0 and column is not None and not _blank(row.fields.get(column)):
        rate = _number(row, column) or 0.0
        if rate <= 0:
            raise ResultsError(f"{row.where}: learning rate {row.fields[column]!r} is not allowed: rates are above 0")
    column = columns.get("seed")
    if column is not None and not _blank(row.fields.get(column)):
        seed = _integer(row, column, "seed", "an integer from 0")
    return rank, rate, seed


def _take(run: _Run, row: Row, key: Key, value: float, columns: Columns) -> bool:
    """Add a row to its training; whether it only repeats another.

    Raises:
        ResultsError: the same training, item and step again with another value.
    """
    item = columns.get("item")
    step = columns.get("step")
    if item is not None:
        name = str(row.fields.get(item))
        weight = _positive(row, columns.get("weight")) or 1.0
        before = run.by_item.setdefault(name, (value, weight, row.where))
        repeats = before[2] != row.where
        if repeats and before[0] != value:
            raise ResultsError(_twice(key, row.where, before[2], f", item {name}"))
    else:
        at = 0 if step is None or _blank(row.fields.get(step)) else _integer(row, step, "step", "an integer from 0")
        first = run.by_step.setdefault(at, (value, row.where))
        repeats = first[1] != row.where
        if repeats and first[0] != value:
            raise ResultsError(_twice(key, row.where, first[1], f", step {at}" if step else ""))
    if repeats:
        return True
    std = columns.get("std")
    if std is not None and not _blank(row.fields.get(std)):
        run.std = _number(row, std)
        if run.std is not None and run.std < 0:
            raise ResultsError(f"{row.where}: {std} {run.std:g} is not allowed: a standard deviation is 0 or above")
        run.std_seeds = int(_positive(row, columns.get("std_seeds")) or 1)
    train = columns.get("train_value")
    run.train_value = run.train_value if train is None else _number(row, train) or run.train_value
    seconds = columns.get("seconds")
    run.seconds = run.seconds if seconds is None else _number(row, seconds) or run.seconds
    for other in columns.others:
        found = _number(row, other, strict=False)
        if found is not None:
            run.others[other] = found
    return False


def _results(runs: Mapping[Key, _Run], columns: Columns) -> Iterator[Result]:
    """One result a training; items in one order, or a complaint that they are ragged."""
    items: list[str] | None = None
    tokens: list[float] = []
    for (rank, rate, seed), run in runs.items():
        values: list[float] = []
        weights: list[float] = []
        if run.by_item:
            names = sorted(run.by_item)
            if items is None:
                items = names
            elif names != items:
                odd = sorted(set(names) ^ set(items))
                raise ResultsError(
                    f"{run.where}: rank {rank} is scored on other items than the rank before ({len(odd)} differ, such as "
                    f"item {odd[0]}); every training must be scored on the same items"
                )
            values = [run.by_item[name][0] for name in items]
            weights = [run.by_item[name][1] for name in items]
            tokens = tokens or weights
            if weights != tokens:
                raise ResultsError(
                    f"{run.where}: rank {rank} has other token counts than the rank before for the same items; an item's "
                    "tokens are the same for every training"
                )
            value = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
        else:
            value = run.by_step[max(run.by_step)][0]
        last = max(run.by_step, default=0)
        yield Result(
            trial_id=run.trial,
            rank=rank,
            learning_rate=rate,
            seed=seed,
            value=value,
            item_values=values,
            item_weights=weights if columns.get("weight") else [],
            std=run.std,
            std_seeds=run.std_seeds,
            train_value=run.train_value,
            seconds=run.seconds,
            steps=last or None,
            points=[(step, run.by_step[step][0]) for step in sorted(run.by_step)] if last else [],
            others=run.others,
        )


def _require_comparable(results: list[Result], runs: Mapping[Key, _Run], where: str) -> None:
    trained = [result for result in results if result.rank > 0 and result.value is not None]
    ranks = {result.rank for result in trained}
    if not ranks:
        raise ResultsError(f"{where}: no row has both a rank and a held-out value; give one row for each training")
    if len(ranks) < 2:
        raise ResultsError(f"{where}: one rank only ({ranks.pop()}); a comparison needs two or more")
    if len({result.value for result in trained}) == 1 and len({tuple(result.item_values) for result in trained}) == 1:
        raise ResultsError(
            f"{where}: every training has the value {trained[0].value:g}; is this the held-out metric? There is nothing to compare"
        )
    rates = {result.learning_rate > 0 for result in trained}
    if len(rates) > 1:
        bare = next(run for key, run in runs.items() if key[0] > 0 and key[1] == 0)
        raise ResultsError(
            f"{bare.where}: no learning rate, though other rows have one; give it, or leave the column out"
        )


def _twice(key: Key, here: str, there: str, what: str) -> str:
    rate = f", lr {key[1]:g}" if key[1] else ""
    return (
        f"{here}: rank {key[0]}{rate}, seed {key[2]}{what} is there twice with different values (also {there}); "
        "add the column that tells them apart (seed, lr or item), or remove one"
    )


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip() in ("", "-", "None", "null", "N/A"))


def _number(row: Row, column: str, strict: bool = True) -> float | None:
    """A finite number, or None for an empty cell."""
    value: Any = row.fields.get(column)
    if _blank(value):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        if not strict:
            return None
        raise ResultsError(f"{row.where}: {column} is {_short(value)}, not a number") from None
    if not math.isfinite(number):
        if not strict:
            return None
        raise ResultsError(
            f"{row.where}: {column} is {number}; leave the cell empty where a training ended without a result"
        )
    if abs(number) > LARGEST_NUMBER:
        raise ResultsError(f"{row.where}: {column} is {number:g}; numbers up to {LARGEST_NUMBER:g} are understood")
    return number


def _positive(row: Row, column: str | None) -> float | None:
    number = None if column is None else _number(row, column)
    if number is not None and number <= 0:
        raise ResultsError(f"{row.where}: {column} {number:g} is not allowed: give a number above 0")
    return number


def _integer(row: Row, column: str, name: str, allowed: str) -> int:
    value: Any = row.fields.get(column)
    number = _number_or_none(None if isinstance(value, bool) else value)
    if number is None or number != int(number) or number < 0:
        raise ResultsError(f"{row.where}: {name} {_short(value)} is not allowed: give {allowed}")
    return int(number)


def _number_or_none(value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
