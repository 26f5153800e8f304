"""Tables of results that others made: groups their rows by training and checks every cell."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rightrank.data.files import UnreadableError, is_text, kind_of, parse_json
from rightrank.data.rows import FILE_TYPES, Row, read_rows, records_of_frame
from rightrank.decision.metrics import is_percent
from rightrank.decision.metrics import kind_of as kind_of_metric
from rightrank.interop.columns import (
    SYNONYMS,
    Columns,
    direction_of,
    identify_columns,
    is_blank,
    listed,
    long_rows,
    names_of,
    plain,
    rows_of_names,
    settings_of_name,
)
from rightrank.interop.importers import import_rows
from rightrank.schema.decision import Result, ResultsTable
from rightrank.schema.errors import MAX_WHOLE, DataError, ResultsError, quoted
from rightrank.schema.metrics import unknown_direction

FAILED = {"failed", "crashed", "killed", "error", "fail", "diverged", "oom", "out of memory"}
UNFINISHED = {"running", "unfinished", "in_progress", "scheduled", "pending", "waiting", "queued", "preempting"}
PRUNED = {"pruned"}  # stopped by a tuner because others were better: neither a result nor a failure
MAX_RANK = 2**20
MIN_NUMBER = 1e-30  # smaller magnitudes are read as 0, before they become subnormal
MAX_NUMBER = 1e12  # a larger held-out value is a mistake, and its square loses precision
MAX_FILE_BYTES = 200 * 2**20  # about 5 million rows
MAX_DEPTH = 8
# Columns of text that tell trainings apart and say nothing of how they were made.
LABELS = {
    "notes", "note", "tags", "tag", "comment", "comments", "user", "host", "hostname", "node", "gpu", "gpu_type",
    "device", "os", "sweep", "created", "updated", "date", "time", "timestamp", "start_time", "end_time", "commit", "git_commit", "message",
}  # fmt: skip
# Columns of text that say that trainings can't be compared, even where each training has another one.
KINDS = {
    "model", "base_model", "model_name", "model_name_or_path", "model_id", "base_model_name_or_path", "dataset",
    "dataset_name", "data", "task", "method", "peft_type", "optimizer", "optim",
}  # fmt: skip
_NUMBER = r"[-+]?(?:\d[\d.,]*|[.,]\d+)(?:e[-+]?\d+)?"
_CELL = re.compile(rf"({_NUMBER})\s*(%?)(?:\s*(?:±|\+/-|\+-)\s*({_NUMBER})\s*(%?))?", re.IGNORECASE)
_PERCENT = re.compile(r"%|pct|percent", re.IGNORECASE)  # in the name of a column
SPREAD = "±"  # the column of the deviations that the cells of the value state

Key = tuple[int, float, int]  # rank, learning rate, seed


@dataclass(frozen=True, slots=True)
class TableOptions:
    metric: str | None = None
    higher_is_better: bool | None = None
    mapping: Mapping[str, str] = field(default_factory=dict)
    margin: float | None = None


@dataclass(slots=True)
class _Training:
    where: str
    trial: str
    by_example: dict[str, tuple[float, float, str]] = field(default_factory=dict)  # value, weight, where
    by_step: dict[int, tuple[float, str]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)  # fields of the result; later rows override earlier ones
    others: dict[str, float] = field(default_factory=dict)


def raw_rows(*sources: Path) -> list[Row]:
    """The rows of a file or folder of results, or of several files; a file's name may say `rank`, `lr` and `seed`.

    Raises:
        ResultsError: a path that is missing, too large or without rows.
    """
    if len(sources) == 1:
        imported = import_rows(sources[0])
        if imported is not None:
            return imported
    files = [path for source in sources for path in _files_of(source)]
    rows = [row for path in files for row in _file_rows(path, named=len(files) > 1)]
    if not rows:
        raise ResultsError(f"{sources[0]}: a header and no rows; give one row for each training")
    return rows


def _files_of(source: Path) -> list[Path]:
    if kind_of(source) not in ("file", "folder"):
        raise ResultsError(f"{source}: no such file or folder; give a CSV or JSONL file of results, or a run folder")
    inside = [source] if source.is_file() else sorted(source.iterdir())
    return [path for path in inside if path == source or (path.is_file() and path.suffix.lower() in FILE_TYPES)]


def _file_rows(path: Path, named: bool) -> list[Row]:
    """The rows of one file, with the settings in its name that no column has where `named`."""
    size = path.stat().st_size
    if size == 0:
        raise ResultsError(f"{path}: the file is empty; give a header and one row for each training")
    if size > MAX_FILE_BYTES:
        raise ResultsError(
            f"{path}: {size / 2**20:,.0f} MiB is too large for a table of results (limit {MAX_FILE_BYTES // 2**20} MiB); "
            "give one row for each training, or for each training and item"
        )
    try:
        rows = [row for split in read_rows(path).values() for row in split]
    except DataError as error:
        raise ResultsError(str(error)) from None
    if not named:
        return rows
    roles = set(map(plain, names_of(rows)))
    settings = {name: value for name, value in settings_of_name(path.stem).items() if not roles & set(SYNONYMS[name])}
    return [Row({**settings, **row.fields}, row.where) for row in rows]


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
    return flat(rows)


def flat(rows: Iterable[Row]) -> list[Row]:
    """Rows with nested mappings, and JSON objects in cells, as dotted names."""
    return [Row(dict(_flat(row.fields)), row.where) for row in rows]


def _flat(fields: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
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


def results_of_rows(rows: list[Row], asked: TableOptions, where: str) -> ResultsTable:
    """The trainings in rows without nested fields, and how each column was read.

    Raises:
        ResultsError: rows that can't be compared; the message names file and row.
    """
    named = rows_of_names(rows, asked.mapping)
    notes = ["rank from the names of the trainings"] if named is not rows else []
    rows = long_rows(named, asked.mapping)
    notes += ["one column a rank"] if rows is not named else []
    columns = identify_columns(rows, asked.metric, asked.mapping, where)
    rows, metric = _one_metric(rows, columns, asked.metric, where)
    rows, columns, has_percent = _plain_cells(rows, columns, where)
    trainings, missing, counts = _gather(rows, columns, metric)
    results = [*_results_of(trainings, columns), *missing]
    _require_comparable(results, trainings, where)
    higher, why = _direction(rows, columns, metric, asked.higher_is_better, where)
    _require_one_kind(rows, columns, where)
    if asked.margin is None:
        notes += _margin_notes(
            metric, higher, [result.value for result in results if result.value is not None], where, has_percent
        )
    roles = [f"{name} from column {column}" for name, column in columns.by_name.items() if name != column]
    roles.append(f"value from column {columns.value}: {'higher' if higher else 'lower'} is better ({why})")
    unused = _unused(rows, columns)
    left = [f"not used: {listed(unused)}"] if unused else []
    return ResultsTable(
        metric=metric, higher_is_better=higher, results=results, understood=[*roles, *notes, *left, *counts]
    )


def _margin_notes(metric: str, higher: bool, values: list[float], where: str, has_percent: bool) -> list[str]:
    """Why the default margin is what it is, where the metric's name does not say it."""
    kind = kind_of_metric(metric, higher)
    if has_percent and kind == "accuracy" and not is_percent(values):
        raise ResultsError(f"{where}: every {metric} is a percentage up to 1; give the margin in points with --margin")
    if kind != "other":
        return []
    return [f"margin: 1% of the best, as the name {metric!r} says no unit (--metric NAME or --margin changes it)"]


def _unused(rows: Sequence[Row], columns: Columns) -> list[str]:
    taken = {*columns.by_name.values(), columns.value, *columns.others, ""}
    names = [name for name in names_of(rows) if name not in taken]
    return [name for name in names if not all(is_blank(row.fields.get(name)) for row in rows)]


def _require_one_kind(rows: Sequence[Row], columns: Columns, where: str) -> None:
    """Refuse trainings that differ in a column of text that is not used, such as `model`.

    A text counts if several ranks share it: one that each training has for itself is its name.

    Raises:
        ResultsError: names the column and two of its texts.
    """
    rank, keys = columns.by_name["rank"], ("rank", "lr", "seed")
    names = [columns.by_name[role] for role in ("trial",) if role in columns.by_name] + _unused(rows, columns)
    measured = [
        row for row in rows if not is_blank(row.fields.get(columns.value)) and not is_blank(row.fields.get(rank))
    ]
    for name in names:
        if plain(name) in LABELS or plain(name).startswith("tags_"):
            continue
        ranks: dict[str, set[str]] = {}
        texts: dict[tuple[str, ...], set[str]] = {}
        for row in measured:
            text = row.fields.get(name)
            if _is_setting(text):
                ranks.setdefault(str(text), set()).add(str(row.fields[rank]))
                texts.setdefault(tuple(str(row.fields.get(columns.get(key) or "")) for key in keys), set()).add(
                    str(text)
                )
        varies = any(
            len(found) > 1 for found in texts.values()
        )  # within a training, as the category of an example does
        shared = any(len(found) > 1 for found in ranks.values())
        if len(ranks) > 1 and not varies and (shared or plain(name) in KINDS):
            one, other = [quoted(text, 40) for text in sorted(ranks)[:2]]
            raise ResultsError(
                f"{where}: the trainings differ in column {name} ({one}, {other}), which is not used; keep the rows of one, "
                "or leave the column out if it does not matter"
            )


def _is_setting(value: Any) -> bool:
    """Whether a cell is a text that may say how a training was made: no number and no date."""
    text = str(value).strip()
    is_number = _float(value) is not None and not isinstance(value, bool)
    return not is_blank(value) and not is_number and not re.match(r"\d{4}-\d\d-\d\d|\d+ days", text)


def _plain_cells(rows: list[Row], columns: Columns, where: str) -> tuple[list[Row], Columns, bool]:
    """`(rows, columns, whether the values are percentages)`, with cells such as `84,06% ± 0,3` and `OOM` as plain numbers and none.

    Raises:
        ResultsError: a comma that may be a decimal or a thousands one, or percent signs on some values only.
    """
    names = [
        columns.value,
        *columns.others,
        *filter(None, map(columns.get, ("lr", "std", "weight", "train_value"))),
    ]
    commas = {name for name in names if _has_decimal_commas(rows, name, where)}
    changed, percents, spread = [], Counter[bool](), False
    for row in rows:
        fields = dict(row.fields)
        for name in names:
            text = fields.get(name)
            if is_blank(text):
                continue
            percent, deviation = "", None
            if isinstance(text, str) and _float(text) is None:
                fields[name], percent, deviation = _parts(text, name in commas)
            if name == columns.value and fields[name] is not None:
                percents[bool(percent or _PERCENT.search(name))] += 1
                if deviation is not None and columns.get("std") is None:
                    fields[SPREAD], spread = deviation, True
        changed.append(Row(fields, row.where))
    if len(percents) > 1:
        raise ResultsError(f"{where}: column {columns.value} has values with and without %; give one unit")
    if spread:
        columns = replace(columns, by_name={**columns.by_name, "std": SPREAD})
    if "std" not in columns.by_name:
        columns = replace(columns, by_name={name: at for name, at in columns.by_name.items() if name != "std_seeds"})
    return changed, columns, percents[True] > 0


def _parts(text: str, has_commas: bool) -> tuple[str | None, str, str | None]:
    """`(number, percent sign, deviation)` of a cell; None and no sign for a word that says that the training failed."""
    if text.strip().lower() in FAILED:
        return None, "", None
    cell = _CELL.fullmatch(text.strip())
    if cell is None:
        return text, "", None
    number, deviation = (part and part.replace(",", ".") if has_commas else part for part in (cell[1], cell[3]))
    return number, cell[2] or cell[4] or "", deviation


def _has_decimal_commas(rows: Iterable[Row], name: str, where: str) -> bool:
    texts = [text for row in rows if isinstance(text := row.fields.get(name), str) and "," in text]
    cells = [cell for text in texts if (cell := _CELL.fullmatch(text.strip()))]
    numbers = [number for cell in cells for number in (cell[1], cell[3]) if number and "," in number]
    if not numbers or not all(re.fullmatch(r"[-+]?\d*,\d+(e[-+]?\d+)?", number, re.IGNORECASE) for number in numbers):
        return False
    if all(re.fullmatch(r"[-+]?[1-9]\d{0,2},\d{3}", number) for number in numbers):
        first = numbers[0]
        raise ResultsError(
            f"{where}: {name} {first!r} may be {first.replace(',', '.')} or {first.replace(',', '')}; write it with a point or without comma"
        )
    return True


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


def _gather(rows: Iterable[Row], columns: Columns, metric: str) -> tuple[dict[Key, _Training], list[Result], list[str]]:
    """`(rows by training, trainings without a result, notes on what was left out)`."""
    trainings: dict[Key, _Training] = {}
    left: dict[str, dict[Key, Row]] = {"failed": {}, "unfinished": {}, "pruned": {}}
    rankless = repeated = 0
    positive = "perplexity" in metric.lower() or metric.lower() == "ppl"
    for row in rows:
        if is_blank(row.fields.get(columns.by_name["rank"])):
            rankless += 1
            continue
        key = _key(row, columns)
        status = str(row.fields.get(columns.get("status") or "", "")).strip().lower()
        if status in UNFINISHED | PRUNED:  # its last value is one part of the way
            left["pruned" if status in PRUNED else "unfinished"].setdefault(key, row)
            continue
        value = None if status in FAILED else _number(row, columns.value)
        if value is None:
            left["failed"].setdefault(key, row)
            continue
        if positive and value <= 0:
            raise ResultsError(f"{row.where}: a perplexity of {value:g} is not possible; perplexities are above 0")
        name = str(row.fields.get(columns.get("trial") or "", "") or row.where)
        repeated += _take(trainings.setdefault(key, _Training(row.where, name)), row, key, value, columns)
    missing = [
        Result(trial_id=row.where, rank=key[0], learning_rate=key[1], seed=key[2], value=None)
        for key, row in left["failed"].items()
        if key not in trainings
    ]
    counts = (
        (rankless, "row", "without a rank left out"),
        (repeated, "repeated row", "left out"),
        (len(missing), "training", "without a result"),
        (len(left["unfinished"]), "unfinished training", "left out"),
        (len(left["pruned"].keys() - trainings.keys()), "pruned training", "left out"),
    )
    return trainings, missing, [f"{count} {noun}{'s' * (count != 1)} {what}" for count, noun, what in counts if count]


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


def _take(training: _Training, row: Row, key: Key, value: float, columns: Columns) -> bool:
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
        learning_rate = f", lr {key[1]:g}" if key[1] else ""
        raise ResultsError(
            f"{row.where}: rank {key[0]}{learning_rate}, seed {key[2]}{what} occurs twice with different values (also {where}); "
            "add the column that distinguishes them (seed, lr or item), or remove one"
        )
    return True


def _note_details(training: _Training, row: Row, columns: Columns) -> None:
    """Store the row's further numbers."""
    std = None if columns.get("std") is None else _number(row, columns.by_name["std"])
    if std is not None and std < 0:
        raise ResultsError(f"{row.where}: std {std:g} is not allowed: a standard deviation is 0 or above")
    if std is not None:
        column = columns.get("std_seeds")
        seeds = _positive(row, column) or 1.0
        if not seeds.is_integer():
            raise ResultsError(f"{row.where}: {column} {seeds:g} is not allowed: give a whole number from 1")
        training.details |= {"std": std, "std_seeds": int(seeds)}
    for name in ("train_value", *columns.others):
        column = columns.get(name) if name in SYNONYMS else name
        number = None if column is None else _number(row, column, strict=False)
        if number is not None:
            (training.details if name in SYNONYMS else training.others)[name] = number


def _results_of(trainings: Mapping[Key, _Training], columns: Columns) -> Iterator[Result]:
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
            odd = sorted(set(training.by_example) ^ set(examples))
            if odd:
                raise ResultsError(
                    f"{training.where}: rank {rank} is scored on other examples than the rank before ({len(odd)} differ, "
                    f"such as {odd[0]}); score every training on the same examples"
                )
            values = [training.by_example[name][0] for name in examples]
            weights = [training.by_example[name][1] for name in examples]
            tokens = tokens or weights
            if weights != tokens:
                raise ResultsError(
                    f"{training.where}: rank {rank} has other token counts than the rank before for the same examples; "
                    "give each example the same count in every training"
                )
        steps = sorted(training.by_step)
        mean = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights) if values else None
        yield Result(
            trial_id=training.trial,
            rank=rank,
            learning_rate=learning_rate,
            seed=seed,
            value=training.by_step[steps[-1]][0] if mean is None else mean,
            item_values=values,
            item_weights=weights if columns.get("weight") else [],
            steps=max(steps, default=0) or None,
            points=[(step, training.by_step[step][0]) for step in steps] if any(steps) else [],
            others=training.others,
            **training.details,
        )


def _require_comparable(results: list[Result], trainings: Mapping[Key, _Training], where: str) -> None:
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


def _number(row: Row, column: str, strict: bool = True) -> float | None:
    """The finite number in a cell; None for an empty cell, and where not `strict` for one that is no number."""
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
