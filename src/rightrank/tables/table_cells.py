"""Parse the cells of result tables: every row becomes a `ResultRow` with checked numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from rightrank.data.rows import Row
from rightrank.schema.errors import MAX_EXACT_INTEGER, ResultsError, quote_value
from rightrank.tables.columns import Columns, is_blank

FAILED_STATES = {"failed", "crashed", "killed", "error", "fail", "diverged", "collapsed", "oom", "out of memory"}
NON_FINITE_TEXTS = {"nan", "inf", "+inf", "-inf", "infinity", "-infinity"}  # values of a training that diverged
UNFINISHED_STATES = {"running", "unfinished", "in_progress", "scheduled", "pending", "waiting", "queued", "preempting"}
PRUNED_STATES = {"pruned"}  # stopped by a tuner because other trainings were better: neither a result nor a failure
MAX_RANK = 2**20
MAX_NUMBER = 1e60  # larger than any metric; squares and sums of such numbers are still finite
WHOLE_NUMBER: tuple[str, Callable[[float], bool]] = (
    "a whole number from 0",
    lambda n: n.is_integer() and 0 <= n <= MAX_EXACT_INTEGER,
)
POSITIVE_NUMBER: tuple[str, Callable[[float], bool]] = (
    f"a number above 0 (from {1 / MAX_NUMBER:g} to {MAX_NUMBER:g})",
    lambda n: 1 / MAX_NUMBER <= n <= MAX_NUMBER,
)
ROLES: dict[str, tuple[str, Callable[[float], bool]]] = {  # the allowed values in words, and a check
    "rank": (f"a whole number up to {MAX_RANK:,}; 0 is the base", lambda n: n.is_integer() and 0 <= n <= MAX_RANK),
    **{"lr": POSITIVE_NUMBER, "weight": POSITIVE_NUMBER, "seed": WHOLE_NUMBER, "step": WHOLE_NUMBER},
    "std": (f"a standard deviation, from 0 to {MAX_NUMBER:g}", lambda n: 0 <= n <= MAX_NUMBER),
    "std_seeds": ("a whole number from 1", lambda n: n.is_integer() and n >= 1),
}
TrainingKey: TypeAlias = tuple[int, float, int]  # rank, learning rate, seed
Outcome: TypeAlias = Literal["value", "blank", "failed", "unfinished", "pruned"]


@dataclass(frozen=True, slots=True)
class ResultRow:
    """A parsed row: an evaluation of a training, or the score of one example."""

    row: Row
    trial: str
    key: TrainingKey
    outcome: Outcome
    value: float | None  # None for every other outcome
    example: str  # empty if the row is about all examples
    group: str  # group of the example; empty if it has none
    step: int
    weight: float
    details: dict[str, float]

    @property
    def origin(self) -> str:
        return self.row.origin


def parse_row(row: Row, columns: Columns, metric: str) -> ResultRow:
    """Parse and check the cells of a row.

    Raises:
        ResultsError: a number that is not allowed.
    """
    outcome = _classify_outcome(row, columns)
    value = _parse_value(row, columns.value) if outcome == "value" else None
    if value is not None and value <= 0 and ("perplexity" in metric.lower() or metric.lower() == "ppl"):
        raise ResultsError(f"{row.origin}: a perplexity of {value:g} is not possible; perplexities are above 0")
    example, group = (_get_cell(row, columns, name) for name in ("example", "group"))
    rank, seed, step = (int(_parse_role(row, columns, name) or 0) for name in ("rank", "seed", "step"))
    rate = _parse_role(row, columns, "lr") if rank else None
    # An example without a score may have no tokens.
    weight = None if value is None else _parse_role(row, columns, "weight")
    return ResultRow(
        row,
        str(_get_cell(row, columns, "trial") or row.origin),
        (rank, rate or 0.0, seed),
        outcome,
        value,
        "" if is_blank(example) else str(example),
        "" if is_blank(group) else str(group),
        step,
        weight or 1.0,
        _parse_details(row, columns),
    )


def _classify_outcome(row: Row, columns: Columns) -> Outcome:
    status, value = str(_get_cell(row, columns, "status")).strip().lower(), row.fields.get(columns.value)
    if status in UNFINISHED_STATES:
        return "unfinished"
    if status in PRUNED_STATES:
        return "pruned"
    if status in FAILED_STATES or str(value).strip().lower() in FAILED_STATES | NON_FINITE_TEXTS:
        return "failed"
    return "blank" if is_blank(value) else "value"


def _get_cell(row: Row, columns: Columns, role: str) -> Any:
    column = columns.by_role.get(role)
    return None if column is None else row.fields.get(column)


def _parse_role(row: Row, columns: Columns, role: str) -> float | None:
    """Return the number in the column of a role, or None if there is no column or the cell is blank."""
    value, (allowed, is_allowed) = _get_cell(row, columns, role), ROLES[role]
    if is_blank(value):
        return None
    number = to_float(value)
    if number is None or not math.isfinite(number) or not is_allowed(number):
        name, advice = "learning rate" if role == "lr" else role, _suggest_notation(str(value).strip())
        raise ResultsError(f"{row.origin}: {name} {quote_value(value, 40)} is not allowed: give {allowed}{advice}")
    return number


def _parse_details(row: Row, columns: Columns) -> dict[str, float]:
    """Return the row's additional numbers, including infinite ones: some by role, and those of other metrics by column."""
    numbers = {name: _parse_role(row, columns, name) for name in ("std", "std_seeds")}
    numbers["train_value"] = to_float(_get_cell(row, columns, "train_value"))
    numbers |= {column: to_float(row.fields.get(column)) for column in columns.other_metrics}
    for name, number in numbers.items():
        if number is not None and math.isfinite(number):
            _require_magnitude(row, columns.by_role.get(name, name), number)
    return {name: number for name, number in numbers.items() if number is not None}


def _parse_value(row: Row, column: str) -> float:
    """Return the finite number in a cell that is not blank."""
    value: Any = row.fields.get(column)
    number = to_float(value)
    if number is None:
        raise ResultsError(
            f"{row.origin}: {column} is {quote_value(value, 40)}, not a number{_suggest_notation(str(value).strip())}"
        )
    _require_magnitude(row, column, number)
    return number


def _require_magnitude(row: Row, column: str, number: float) -> None:
    if not abs(number) <= MAX_NUMBER:
        raise ResultsError(
            f"{row.origin}: {column} is {number:g}; give a number from -{MAX_NUMBER:g} to {MAX_NUMBER:g}, or leave the cell empty where a "
            "training ended without a result"
        )


def _suggest_notation(text: str) -> str:
    """Return advice for a number with a decimal comma or a percent sign, or for a truth value."""
    if re.fullmatch(r"[-+]?\d*,\d+", text):
        return f"; write it with a decimal point ({text.replace(',', '.')})"
    if re.fullmatch(r"[-+]?[\d.,]+\s*%", text):
        return f"; write it without the percent sign ({text.rstrip('% ').replace(',', '.')}), in every row alike"
    if text.lower() in ("true", "false"):
        return "; give the held-out number, or scores of 1 and 0 where a right answer counts"
    return ""


def to_float(value: Any) -> float | None:
    """Convert a cell to a float, or return None if it is not a number."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
