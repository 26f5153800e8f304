"""Parse the cells of a result table: each row becomes a `ResultRow` with checked numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from rightrank.data.rows import Row
from rightrank.interop.columns import Columns, is_blank
from rightrank.schema.errors import MAX_WHOLE, ResultsError, quoted

FAILED = {"failed", "crashed", "killed", "error", "fail", "diverged", "collapsed", "oom", "out of memory"}
NO_NUMBERS = {"nan", "inf", "+inf", "-inf", "infinity", "-infinity"}  # of a training that diverged
UNFINISHED = {"running", "unfinished", "in_progress", "scheduled", "pending", "waiting", "queued", "preempting"}
PRUNED = {"pruned"}  # stopped by a tuner because others were better: neither a result nor a failure
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
class ResultRow:
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


def parse_row(row: Row, columns: Columns, metric: str) -> ResultRow:
    outcome = _outcome(row, columns)
    value = _number(row, columns.value) if outcome == "value" else None
    if value is not None and value <= 0 and ("perplexity" in metric.lower() or metric.lower() == "ppl"):
        raise ResultsError(f"{row.where}: a perplexity of {value:g} is not possible; perplexities are above 0")
    item, group = (_cell(row, columns, name) for name in ("item", "group"))
    rank, seed, step = (int(_of_role(row, columns, name) or 0) for name in ("rank", "seed", "step"))
    rate = _of_role(row, columns, "lr") if rank else None
    # An example without a score may have no tokens.
    weight = None if value is None else _of_role(row, columns, "weight")
    return ResultRow(
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
    number = to_float(value)
    if number is None or not math.isfinite(number) or not fits(number):
        name, advice = "learning rate" if role == "lr" else role, _advice(str(value).strip())
        raise ResultsError(f"{row.where}: {name} {quoted(value, 40)} is not allowed: give {allowed}{advice}")
    return number


def _details(row: Row, columns: Columns) -> dict[str, float]:
    """Return the row's further numbers, also those that are not finite: by role, and those of other metrics by column."""
    numbers = {name: _of_role(row, columns, name) for name in ("std", "std_seeds")}
    numbers["train_value"] = to_float(_cell(row, columns, "train_value"))
    numbers |= {column: to_float(row.fields.get(column)) for column in columns.others}
    for name, number in numbers.items():
        if number is not None and math.isfinite(number):
            _require_size(row, columns.by_name.get(name, name), number)
    return {name: number for name, number in numbers.items() if number is not None}


def _number(row: Row, column: str) -> float:
    """Return the finite number in a cell that is not blank."""
    value: Any = row.fields.get(column)
    number = to_float(value)
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


def to_float(value: Any) -> float | None:
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
