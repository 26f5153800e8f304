"""Tables of results that others made: groups their rows by training and checks every cell."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from rightrank.data.files import UnreadableError, parse_json, path_kind
from rightrank.data.rows import FILE_TYPES, Row, read_rows, records_of_frame
from rightrank.interop.columns import (
    SYNONYMS,
    Columns,
    direction_of,
    identify_columns,
    import_rows,
    is_blank,
    listed,
    names_of,
    plain,
    settings_of_name,
)
from rightrank.schema.decision import Result, ResultsTable
from rightrank.schema.errors import MAX_WHOLE, DataError, ResultsError, quoted
from rightrank.schema.metrics import is_percent, metric_kind, unknown_direction
from rightrank.schema.settings import TRAINER_FIELDS, PeftFields, SelectSettings

FAILED = {"failed", "crashed", "killed", "error", "fail", "diverged", "oom", "out of memory"}
NO_NUMBERS = {"nan", "inf", "+inf", "-inf", "infinity", "-infinity"}  # of a training that diverged
UNFINISHED = {"running", "unfinished", "in_progress", "scheduled", "pending", "waiting", "queued", "preempting"}
PRUNED = {"pruned"}  # stopped by a tuner because others were better: neither a result nor a failure
MAX_DEPTH = 8
# Columns that say that trainings can't be compared: the task, the kind of adapter, and a setting of all trainings by any of its names.
OF_ALL = ("batch_size", "seq_len", "num_train_epochs")
KINDS = {
    "model", "base_model", "model_name", "model_name_or_path", "model_id", "base_model_name_or_path", "dataset",
    "dataset_name", "data", "task", "method", "peft_type", "optimizer", "optim", "metric", "metric_name", "use_rslora",
    "train_samples", "num_train_samples", "max_train_samples", "train_size", *PeftFields.model_fields,
    *TRAINER_FIELDS, *OF_ALL, *(other for name in OF_ALL for other in SelectSettings.model_fields[name].also),
}  # fmt: skip
ALPHAS = {"lora_alpha", "alpha", "network_alpha"}
MAX_RANK = 2**20
WHOLE: tuple[str, Callable[[float], bool]] = ("a whole number from 0", lambda n: n.is_integer() and 0 <= n <= MAX_WHOLE)
ABOVE_0: tuple[str, Callable[[float], bool]] = ("a number above 0", lambda n: n > 0)
ROLES: dict[str, tuple[str, Callable[[float], bool]]] = {  # what a cell may hold, in words, and whether a number is it
    "rank": (f"a whole number up to {MAX_RANK:,}; 0 is the base", lambda n: n.is_integer() and 0 <= n <= MAX_RANK),
    **{"lr": ABOVE_0, "weight": ABOVE_0, "seed": WHOLE, "step": WHOLE},
    "std": ("a standard deviation, which is 0 or above", lambda n: n >= 0),
    "std_seeds": ("a whole number from 1", lambda n: n.is_integer() and n >= 1),
}

Key: TypeAlias = tuple[int, float, int]  # rank, learning rate, seed


@dataclass(frozen=True, slots=True)
class _Line:
    """A row of a training."""

    where: str
    trial: str
    key: Key
    status: str
    value: float | None  # None: the training failed
    item: str  # empty: of all examples
    group: str  # of the example; empty: it stands for itself
    step: int
    weight: float
    details: dict[str, float]


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
    return _flat_rows(rows)


def _flat_rows(rows: Iterable[Row]) -> list[Row]:
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


def results_of_rows(
    rows: list[Row],
    where: str,
    metric: str | None,
    higher: bool | None,
    margin: float | None,
    mapping: Mapping[str, str],
) -> ResultsTable:
    """The trainings in rows, and how each column was read. `where` is the table's name in error messages.

    Raises:
        ResultsError: rows that can't be compared; the message names file and row.
    """
    flat = _flat_rows(rows)
    named = _rows_of_names(flat, mapping)
    notes = ["rank from the names of the trainings"] if named is not flat else []
    columns = identify_columns(named, metric, mapping, where)
    _require_one_kind(named, where, columns.by_name["rank"])
    metric = columns.metric
    with_rank = [row for row in named if not is_blank(row.fields.get(columns.by_name["rank"]))]
    lines = [_line(row, columns, metric) for row in with_rank]
    results, counts = _results(lines, columns)
    groups = _groups(lines, mapping.get("group"), where)
    results = [run.model_copy(update={"item_groups": groups}) if run.item_values else run for run in results]
    _require_comparable(results, where)
    if groups is None:
        columns = replace(columns, by_name={name: title for name, title in columns.by_name.items() if name != "group"})
    higher, why = _direction(metric, higher, where)
    if metric_kind(metric, higher) == "accuracy":
        _require_one_unit(results, metric, where)
    if margin is None and metric_kind(metric, higher) == "other":
        notes.append(
            f"margin: 1% of the best, as the name {metric!r} says no unit (--metric NAME or --margin changes it)"
        )
    roles = [f"{name} from column {column}" for name, column in columns.by_name.items() if name != column]
    roles.append(f"value from column {columns.value}: {'higher' if higher else 'lower'} is better ({why})")
    taken = {*columns.by_name.values(), columns.value, *columns.others, ""}
    unused = [name for name in names_of(named) if name not in taken and _texts_of(named, name)]
    left = [f"not used: {listed(unused)}"] if unused else []
    rankless = len(named) - len(with_rank)
    left += [f"{rankless} row{'s' * (rankless != 1)} without a rank left out"] if rankless else []
    return ResultsTable(
        metric=metric, higher_is_better=higher, results=results, understood=[*roles, *notes, *left, *counts]
    )


def _rows_of_names(rows: list[Row], mapping: Mapping[str, str]) -> list[Row]:
    """Rows whose rank is in their name alone (`lora-r16-seed0`), with what the names say as columns; others as they are."""
    names = names_of(rows)
    if "rank" in mapping or set(map(plain, names)) & set(SYNONYMS["rank"]):
        return rows
    for name in names:
        told = [settings_of_name(str(row.fields.get(name) or "")) for row in rows]
        ranks = {settings.get("rank") for settings in told}
        if len(ranks) > 1 and None not in ranks:
            return [Row({**settings, **row.fields}, row.where) for settings, row in zip(told, rows, strict=True)]
    return rows


def _texts_of(rows: Iterable[Row], column: str) -> list[str]:
    """The different texts of a column's cells that are not blank, sorted."""
    return sorted({str(row.fields.get(column)) for row in rows if not is_blank(row.fields.get(column))})


def _is_one_scale(rows: Sequence[Row], column: str, rank: str) -> bool:
    """Whether alpha is constant, or in proportion to the rank or to its root; also where either is no number."""
    pairs = [(_float(row.fields.get(column)), _float(row.fields.get(rank))) for row in rows]
    known = [(alpha, r) for alpha, r in pairs if alpha is not None and r is not None and r > 0]
    return any(len({round(alpha / r**power, 9) for alpha, r in known}) <= 1 for power in (0.0, 1.0, 0.5))


def _require_one_kind(rows: Sequence[Row], where: str, rank: str) -> None:
    """Refuse trainings of several models, data sets, methods or settings that change what a rank is worth."""
    for name in names_of(rows):
        texts = _texts_of(rows, name)
        if plain(name) in ALPHAS and not _is_one_scale(rows, name, rank):
            raise ResultsError(
                f"{where}: column {name} is neither the same at every rank nor in proportion to it ({', '.join(texts[:4])}), so the scale of "
                "the adapters differs beside their rank; keep the rows of one rule, or leave the column out if it does not matter"
            )
        if plain(name) in KINDS and len(texts) > 1:
            first, other = [quoted(text, 40) for text in texts[:2]]
            raise ResultsError(
                f"{where}: the trainings differ in column {name} ({first}, {other}), which is not used; keep the rows of one, "
                "or leave the column out if it does not matter"
            )


def _direction(metric: str, asked: bool | None, where: str) -> tuple[bool, str]:
    """`(higher is better, why)`."""
    if asked is not None:
        return asked, "as given"
    known = direction_of(metric)
    if known is None:
        raise ResultsError(
            f"{where}: {unknown_direction(metric)}; give --higher-is-better or --lower-is-better, or --metric NAME"
        )
    return known, f"from its name, {metric}"


def _line(row: Row, columns: Columns, metric: str) -> _Line:
    status = str(_cell(row, columns, "status")).strip().lower()
    failed = status in FAILED or str(row.fields.get(columns.value)).strip().lower() in FAILED | NO_NUMBERS
    value = None if failed or status in UNFINISHED | PRUNED else _number(row, columns.value)
    if value is not None and value <= 0 and ("perplexity" in metric.lower() or metric.lower() == "ppl"):
        raise ResultsError(f"{row.where}: a perplexity of {value:g} is not possible; perplexities are above 0")
    item, group = (_cell(row, columns, name) for name in ("item", "group"))
    rank, seed, step = (int(_of_role(row, columns, name) or 0) for name in ("rank", "seed", "step"))
    rate = _of_role(row, columns, "lr") if rank else None
    return _Line(
        row.where,
        str(_cell(row, columns, "trial") or row.where),
        (rank, rate or 0.0, seed),
        status,
        value,
        "" if is_blank(item) else str(item),
        "" if is_blank(group) else str(group),
        step,
        _of_role(row, columns, "weight") or 1.0,
        _details(row, columns),
    )


def _cell(row: Row, columns: Columns, role: str) -> Any:
    column = columns.by_name.get(role)
    return None if column is None else row.fields.get(column)


def _of_role(row: Row, columns: Columns, role: str) -> float | None:
    """The number in the column of a role; None where there is none, or the cell is blank."""
    value, (allowed, fits) = _cell(row, columns, role), ROLES[role]
    if is_blank(value):
        return None
    number = None if isinstance(value, bool) else _float(value)
    if number is None or not math.isfinite(number) or not fits(number):
        name, advice = "learning rate" if role == "lr" else role, _advice(str(value).strip())
        raise ResultsError(f"{row.where}: {name} {quoted(value, 40)} is not allowed: give {allowed}{advice}")
    return number


def _details(row: Row, columns: Columns) -> dict[str, float]:
    """The row's further numbers: those of a result by role, those of other metrics by column; later rows override earlier ones."""
    numbers = {name: _of_role(row, columns, name) for name in ("std", "std_seeds")}
    numbers["train_value"] = _float(_cell(row, columns, "train_value"))
    numbers |= {column: _float(row.fields.get(column)) for column in columns.others}
    return {name: number for name, number in numbers.items() if number is not None and math.isfinite(number)}


def _results(lines: Sequence[_Line], columns: Columns) -> tuple[list[Result], list[str]]:
    """`(one result for each training, notes on what was left out)`."""
    trainings: dict[Key, dict[tuple[str, int], _Line]] = {}
    left: dict[str, dict[Key, _Line]] = {"failed": {}, "unfinished": {}, "pruned": {}}
    repeated = 0
    for line in lines:
        if line.value is None:
            kind = "unfinished" if line.status in UNFINISHED else "pruned" if line.status in PRUNED else "failed"
            left[kind].setdefault(line.key, line)
            continue
        first = trainings.setdefault(line.key, {}).setdefault((line.item, line.step), line)
        if first.value != line.value:
            raise _two_values(line, first, columns)
        repeated += first is not line
    results = [_result(list(training.values()), columns) for training in trainings.values()]
    _require_same_examples(list(trainings.values()))
    failed = [line for key, line in left["failed"].items() if key not in trainings]
    for line in failed:
        rank, learning_rate, seed = line.key
        results.append(Result(trial_id=line.where, rank=rank, learning_rate=learning_rate, seed=seed, value=None))
    counts = (
        (repeated, "repeated row", "left out"),
        (len(failed), "training", "without a result"),
        (len(left["unfinished"]), "unfinished training", "left out"),
        (len(left["pruned"].keys() - trainings.keys()), "pruned training", "left out"),
    )
    return results, [f"{count} {noun}{'s' * (count != 1)} {what}" for count, noun, what in counts if count]


def _two_values(line: _Line, first: _Line, columns: Columns) -> ResultsError:
    rank, learning_rate, seed = line.key
    rate = f", lr {learning_rate:g}" if learning_rate else ""
    what = f", example {line.item}" if line.item else f", step {line.step}" if columns.by_name.get("step") else ""
    return ResultsError(
        f"{line.where}: rank {rank}{rate}, seed {seed}{what} occurs twice with different values (also {first.where}); add the "
        "column that distinguishes them (seed, lr or item), or remove one"
    )


def _scored(lines: Iterable[_Line]) -> dict[str, _Line]:
    """By example, the row of its last look."""
    last = {line.item: line for line in sorted(lines, key=lambda line: line.step) if line.item}
    return dict(sorted(last.items()))


def _result(lines: Sequence[_Line], columns: Columns) -> Result:
    """One training: the mean over its examples, or its last look."""
    (rank, learning_rate, seed), examples = lines[0].key, _scored(lines).values()
    points = sorted((line.step, line.value) for line in lines if not line.item and line.value is not None)
    values = [line.value for line in examples if line.value is not None]
    weights = [line.weight for line in examples]
    mean = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights) if values else points[-1][1]
    steps = max((step for step, _ in points), default=0)
    details = {name: number for line in lines for name, number in line.details.items()}
    return Result(
        trial_id=lines[0].trial,
        rank=rank,
        learning_rate=learning_rate,
        seed=seed,
        value=mean,
        item_values=values,
        item_weights=weights if columns.by_name.get("weight") else [],
        std=details.get("std"),
        std_seeds=int(details.get("std_seeds", 1)) if "std" in details else 1,
        train_value=details.get("train_value"),
        steps=steps or None,
        points=points if steps else [],
        others={name: details[name] for name in columns.others if name in details},
    )


def _groups(lines: Iterable[_Line], asked: str | None, where: str) -> list[int] | None:
    """The groups of the examples, numbered in their order; None where the table has none."""
    by_item: dict[str, set[str]] = {}
    for line in lines:
        if line.item:
            by_item.setdefault(line.item, set()).add(line.group or f"example {line.item}")
    names = [min(groups) for _, groups in sorted(by_item.items())]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    twice = next((item for item, groups in by_item.items() if len(groups) > 1), None)
    if twice is None and 1 < len(places) < len(names):
        return [places[name] for name in names]
    if asked is not None:
        what = (
            "there is no column of examples (item)" if not names else f"example {twice} has two" if twice is not None
            else "all examples share one" if len(places) == 1 else "no two examples share one"
        )  # fmt: skip
        raise ResultsError(
            f"{where}: column {asked} gives the examples no groups: {what}; name one with several values, each of several "
            "examples, or leave it out: examples are then taken as independent"
        )
    return None


def _require_same_examples(trainings: Sequence[Mapping[tuple[str, int], _Line]]) -> None:
    before: dict[str, float] = {}
    for training in trainings:
        scored = _scored(training.values())
        own = {item: line.weight for item, line in scored.items()}
        if not own:
            continue
        before = before or own
        line, odd = next(iter(scored.values())), sorted(own.keys() ^ before.keys())
        if odd:
            raise ResultsError(
                f"{line.where}: rank {line.key[0]} is scored on other examples than the rank before ({len(odd)} differ, such as "
                f"{odd[0]}); score every training on the same examples"
            )
        if own != before:
            raise ResultsError(
                f"{line.where}: rank {line.key[0]} has other token counts than the rank before for the same examples; give each "
                "example the same count in every training"
            )


def _require_comparable(results: list[Result], where: str) -> None:
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
        bare = next(result for result in trained if result.learning_rate == 0)
        raise ResultsError(
            f"{bare.trial_id}: no learning rate, though other rows have one; give it, or leave the column out"
        )


def _require_one_unit(results: list[Result], metric: str, where: str) -> None:
    """Refuse accuracies of which some are fractions and some percentages."""
    values = sorted(result.value for result in results if result.value)
    if values and (values[0] < 0 or values[-1] > 100 or (is_percent(values) and values[0] <= 1)):
        raise ResultsError(
            f"{where}: {metric} is {values[0]:g} in one training and {values[-1]:g} in another; write all as fractions from 0 to 1, or all "
            "as percentages above 1"
        )


def _number(row: Row, column: str) -> float | None:
    """The finite number in a cell; None for an empty one."""
    value: Any = row.fields.get(column)
    if is_blank(value):
        return None
    number = _float(value)
    if number is None:
        raise ResultsError(f"{row.where}: {column} is {quoted(value, 40)}, not a number{_advice(str(value).strip())}")
    if not math.isfinite(number):
        raise ResultsError(
            f"{row.where}: {column} is {number}; leave the cell empty where a training ended without a result"
        )
    return number


def _advice(text: str) -> str:
    """How to write a number with a decimal comma or a percent sign."""
    if re.fullmatch(r"[-+]?\d*,\d+", text):
        return f"; write it with a decimal point ({text.replace(',', '.')})"
    if re.fullmatch(r"[-+]?[\d.,]+\s*%", text):
        return f"; write it without the percent sign ({text.rstrip('% ').replace(',', '.')}), in every row alike"
    return ""


def _float(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
