"""Groups the rows of a results table by training and validates every cell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rightrank.errors import ResultsError, quoted
from rightrank.io.columns import Columns
from rightrank.io.rows import Row
from rightrank.records import Result
from rightrank.records.base import MAX_WHOLE

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
