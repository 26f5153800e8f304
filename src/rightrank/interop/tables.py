"""Tables of results that others made: groups their rows by training and checks every cell."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from rightrank.data.files import UnreadableError, parse_json, path_kind
from rightrank.data.rows import FILE_TYPES, Row, cell_delimiter, read_rows, records_of_frame
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

FAILED = {"failed", "crashed", "killed", "error", "fail", "diverged", "collapsed", "oom", "out of memory"}
NO_NUMBERS = {"nan", "inf", "+inf", "-inf", "infinity", "-infinity"}  # of a training that diverged
UNFINISHED = {"running", "unfinished", "in_progress", "scheduled", "pending", "waiting", "queued", "preempting"}
PRUNED = {"pruned"}  # stopped by a tuner because others were better: neither a result nor a failure
DECIMAL_COMMA = re.compile(r"[-+]?\d*,\d+(e[-+]?\d+)?", re.IGNORECASE)
DECIMAL_POINT = re.compile(r"[-+]?\d*\.\d+(e[-+]?\d+)?", re.IGNORECASE)
THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(,\d{3})+")
MAX_DEPTH = 8
STAGES = re.compile(r"base|whole|truncated|(annealed )?to step \d+")  # cells of the column `stage` of an exported run
COMPARED_STAGES = {"base", "whole"}
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
MAX_NUMBER = 1e60  # above what any metric is; squares and sums of such numbers are still finite
WHOLE: tuple[str, Callable[[float], bool]] = ("a whole number from 0", lambda n: n.is_integer() and 0 <= n <= MAX_WHOLE)
ABOVE_0: tuple[str, Callable[[float], bool]] = (
    f"a number above 0 (from {1 / MAX_NUMBER:g} to {MAX_NUMBER:g})",
    lambda n: 1 / MAX_NUMBER <= n <= MAX_NUMBER,
)
ROLES: dict[str, tuple[str, Callable[[float], bool]]] = {  # what a cell may hold, in words, and whether a number is it
    "rank": (f"a whole number up to {MAX_RANK:,}; 0 is the base", lambda n: n.is_integer() and 0 <= n <= MAX_RANK),
    **{"lr": ABOVE_0, "weight": ABOVE_0, "seed": WHOLE, "step": WHOLE},
    "std": (f"a standard deviation, from 0 to {MAX_NUMBER:g}", lambda n: 0 <= n <= MAX_NUMBER),
    "std_seeds": ("a whole number from 1", lambda n: n.is_integer() and n >= 1),
}

Key: TypeAlias = tuple[int, float, int]  # rank, learning rate, seed
Outcome: TypeAlias = Literal["value", "blank", "failed", "unfinished", "pruned"]


@dataclass(frozen=True, slots=True)
class _Line:
    """A row of a training."""

    row: Row
    trial: str
    key: Key
    outcome: Outcome
    value: float | None  # None: every other outcome
    item: str  # empty: of all examples
    group: str  # of the example; empty: it stands for itself
    step: int
    weight: float
    details: dict[str, float]

    @property
    def where(self) -> str:
        return self.row.where


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
    flat, num_partial = _compared_stages(_flat_rows(rows), where)
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
    left += (
        [f"{num_partial} row{'s' * (num_partial != 1)} of truncated or stopped trainings left out"]
        if num_partial
        else []
    )
    return ResultsTable(
        metric=metric, higher_is_better=higher, results=results, understood=[*roles, *notes, *left, *counts]
    )


def _compared_stages(rows: list[Row], where: str) -> tuple[list[Row], int]:
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


def _rows_of_names(rows: list[Row], mapping: Mapping[str, str]) -> list[Row]:
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
    outcome = _outcome(row, columns)
    value = _number(row, columns.value) if outcome == "value" else None
    if value is not None and value <= 0 and ("perplexity" in metric.lower() or metric.lower() == "ppl"):
        raise ResultsError(f"{row.where}: a perplexity of {value:g} is not possible; perplexities are above 0")
    item, group = (_cell(row, columns, name) for name in ("item", "group"))
    rank, seed, step = (int(_of_role(row, columns, name) or 0) for name in ("rank", "seed", "step"))
    rate = _of_role(row, columns, "lr") if rank else None
    # An example without a score may have no tokens.
    weight = None if value is None else _of_role(row, columns, "weight")
    return _Line(
        row,
        str(_cell(row, columns, "trial") or row.where),
        (rank, rate or 0.0, seed),
        outcome,
        value,
        "" if is_blank(item) else str(item),
        "" if is_blank(group) else str(group),
        step,
        weight or 1.0,
        _details(row, columns),
    )


def _outcome(row: Row, columns: Columns) -> Outcome:
    status, value = str(_cell(row, columns, "status")).strip().lower(), row.fields.get(columns.value)
    if status in UNFINISHED:
        return "unfinished"
    if status in PRUNED:
        return "pruned"
    if status in FAILED or str(value).strip().lower() in FAILED | NO_NUMBERS:
        return "failed"
    return "blank" if is_blank(value) else "value"


def _cell(row: Row, columns: Columns, role: str) -> Any:
    column = columns.by_name.get(role)
    return None if column is None else row.fields.get(column)


def _of_role(row: Row, columns: Columns, role: str) -> float | None:
    """The number in the column of a role; None where there is none, or the cell is blank."""
    value, (allowed, fits) = _cell(row, columns, role), ROLES[role]
    if is_blank(value):
        return None
    number = _float(value)
    if number is None or not math.isfinite(number) or not fits(number):
        name, advice = "learning rate" if role == "lr" else role, _advice(str(value).strip())
        raise ResultsError(f"{row.where}: {name} {quoted(value, 40)} is not allowed: give {allowed}{advice}")
    return number


def _details(row: Row, columns: Columns) -> dict[str, float]:
    """Return the row's further numbers, also those that are not finite: by role, and those of other metrics by column."""
    numbers = {name: _of_role(row, columns, name) for name in ("std", "std_seeds")}
    numbers["train_value"] = _float(_cell(row, columns, "train_value"))
    numbers |= {column: _float(row.fields.get(column)) for column in columns.others}
    for name, number in numbers.items():
        if number is not None and math.isfinite(number):
            _require_size(row, columns.by_name.get(name, name), number)
    return {name: number for name, number in numbers.items() if number is not None}


def _merged_details(lines: Sequence[_Line]) -> dict[str, float]:
    """Return the further numbers of a training by its last evaluation; of rows of examples those that all of them share."""
    details: dict[str, float] = {}
    for line in sorted(lines, key=lambda line: line.step):
        if not line.item:
            details |= line.details
    of_items = [line.details for line in lines if line.item]
    for name in {name for by_name in of_items for name in by_name} - details.keys():
        numbers = {by_name.get(name) for by_name in of_items}
        if len(numbers) == 1 and (number := numbers.pop()) is not None:
            details[name] = number
    return {name: number for name, number in details.items() if math.isfinite(number)}


def _results(lines: Sequence[_Line], columns: Columns) -> tuple[list[Result], list[str]]:
    """`(one result for each training, notes on what was left out)`."""
    trainings: dict[Key, dict[tuple[str, int], _Line]] = {}
    left: dict[Outcome, dict[Key, list[_Line]]] = {name: {} for name in ("failed", "unfinished", "pruned")}
    repeated = 0
    for line in lines:
        if line.outcome != "value":
            left["failed" if line.outcome == "blank" else line.outcome].setdefault(line.key, []).append(line)
            continue
        first = trainings.setdefault(line.key, {}).setdefault((line.item, line.step), line)
        if first.value != line.value:
            raise _two_values(line, first, columns)
        repeated += first is not line
    steps = {step for training in trainings.values() for item, step in training if not item}
    missing_scores: dict[Key, dict[str, _Line]] = {}
    for key, failures in left["failed"].items():
        training = trainings.get(key, {})
        if _ends_without_value(failures, list(training.values()), steps, "trial" in columns.by_name):
            del trainings[key]
            continue
        missing_scores[key] = _unscored_examples(failures, training)
        for item, step in list(training):
            if item in missing_scores[key]:
                del training[item, step]
        if not training:
            trainings.pop(key, None)
    _require_same_examples(trainings, missing_scores)
    results = [_result(list(training.values()), columns) for training in trainings.values()]
    failed = [failures[0] for key, failures in left["failed"].items() if key not in trainings]
    for line in failed:
        rank, learning_rate, seed = line.key
        results.append(Result(trial_id=line.where, rank=rank, learning_rate=learning_rate, seed=seed, value=None))
    examples = sorted({item for key in trainings for item in missing_scores.get(key, ())})
    counts = (
        (repeated, "repeated row", "left out"),
        (len(examples), "example", f"without a score left out ({listed(examples)})"),
        (len(failed), "training", "without a result"),
        (len(left["unfinished"]), "unfinished training", "left out"),
        (len(left["pruned"].keys() - trainings.keys()), "pruned training", "left out"),
    )
    return results, [f"{count} {noun}{'s' * (count != 1)} {what}" for count, noun, what in counts if count]


def _ends_without_value(
    failures: Sequence[_Line], evaluations: Sequence[_Line], steps: Collection[int], has_trials: bool
) -> bool:
    """Whether the last evaluation of a training has no value, so that an earlier one is not its result.

    A blank cell is an evaluation only at a step at which some training has a value: logs have rows of the training loss alone.
    """
    last = max((line.step for line in evaluations if not line.item), default=None)
    trials = {line.trial for line in evaluations}
    return last is not None and any(
        line.step > last and (line.outcome == "failed" or line.step in steps)
        for line in failures
        if not line.item and (line.trial in trials or not has_trials)
    )


def _unscored_examples(failures: Sequence[_Line], training: Mapping[tuple[str, int], _Line]) -> dict[str, _Line]:
    """Return the examples whose last row has no score, each with that row."""
    last: dict[str, int] = {}
    for item, step in training:
        last[item] = max(step, last.get(item, step))
    return {line.item: line for line in failures if line.item and line.step > last.get(line.item, -1)}


def _two_values(line: _Line, first: _Line, columns: Columns) -> ResultsError:
    rank, learning_rate, seed = line.key
    rate = f", lr {learning_rate:g}" if learning_rate else ""
    what = f", example {line.item}" if line.item else f", step {line.step}" if columns.by_name.get("step") else ""
    taken = {*columns.by_name.values(), columns.value, *columns.others}
    fields, other = line.row.fields, first.row.fields
    other_columns = [
        name for name in names_of([line.row, first.row]) if fields.get(name) != other.get(name) and name not in taken
    ]
    advice = (
        f"they differ in {listed(other_columns)} too; keep the rows of one training for each rank, learning rate and seed"
        if other_columns
        else "add the column that distinguishes them (seed, lr or item), or remove one"
    )
    return ResultsError(
        f"{line.where}: rank {rank}{rate}, seed {seed}{what} occurs twice with different values (also {first.where}); {advice}"
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
    details = _merged_details(lines)
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


def _require_same_examples(
    trainings: Mapping[Key, Mapping[tuple[str, int], _Line]], missing_scores: Mapping[Key, Mapping[str, _Line]]
) -> None:
    scored_items = {item for training in trainings.values() for item, _ in training}
    before: dict[str, float] = {}
    for key, training in trainings.items():
        for item, line in missing_scores.get(key, {}).items():
            if item in scored_items:
                raise ResultsError(
                    f"{line.where}: rank {key[0]} has no score for example {item}, which other trainings have; score every training on the "
                    "same examples, or leave this one out of all"
                )
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


def _number(row: Row, column: str) -> float:
    """Return the finite number in a cell that is not blank."""
    value: Any = row.fields.get(column)
    number = _float(value)
    if number is None:
        raise ResultsError(f"{row.where}: {column} is {quoted(value, 40)}, not a number{_advice(str(value).strip())}")
    _require_size(row, column, number)
    return number


def _require_size(row: Row, column: str, number: float) -> None:
    if not abs(number) <= MAX_NUMBER:
        raise ResultsError(
            f"{row.where}: {column} is {number:g}; give a number from -{MAX_NUMBER:g} to {MAX_NUMBER:g}, or leave the cell empty where a "
            "training ended without a result"
        )


def _advice(text: str) -> str:
    """Return how to write a number with a decimal comma or a percent sign, or a truth value."""
    if re.fullmatch(r"[-+]?\d*,\d+", text):
        return f"; write it with a decimal point ({text.replace(',', '.')})"
    if re.fullmatch(r"[-+]?[\d.,]+\s*%", text):
        return f"; write it without the percent sign ({text.rstrip('% ').replace(',', '.')}), in every row alike"
    if text.lower() in ("true", "false"):
        return "; give the held-out number, or scores of 1 and 0 where a right answer counts"
    return ""


def _float(value: Any) -> float | None:
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
