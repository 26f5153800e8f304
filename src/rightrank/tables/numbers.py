"""Convert the cells of a result table to checked numbers, and number its trainings, steps and examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rightrank.schema.errors import MAX_EXACT_INTEGER, ResultsError, quote_value
from rightrank.schema.trials import Floats
from rightrank.tables.columns import Codes, Table, is_blank
from rightrank.tables.roles import Roles

MAX_RANK = 2**20
MAX_NUMBER = 1e60  # larger than any metric; squares and sums of such numbers are still finite
Mask: TypeAlias = "NDArray[np.bool_]"
Check: TypeAlias = Callable[[Floats], Mask]


def _is_whole(numbers: Floats) -> Mask:
    return np.equal(numbers, np.floor(numbers)) & (numbers >= 0) & (numbers <= MAX_EXACT_INTEGER)


_WHOLE: tuple[str, Check] = ("a whole number from 0", _is_whole)
_NOT_NEGATIVE: tuple[str, Check] = (f"a number from 0 to {MAX_NUMBER:g}", lambda n: (n >= 0) & (n <= MAX_NUMBER))
_FINITE: tuple[str, Check] = (
    f"a number from -{MAX_NUMBER:g} to {MAX_NUMBER:g}, or leave the cell empty where a training has no result",
    lambda numbers: (np.abs(numbers) <= MAX_NUMBER) | np.isinf(numbers),
)
LIMITS: dict[str, tuple[str, Check]] = {  # the allowed numbers of a role in words, and a check
    "rank": (f"a whole number up to {MAX_RANK:,}; 0 is the base", lambda n: _is_whole(n) & (n <= MAX_RANK)),
    "std_seeds": ("a whole number from 1", lambda n: _is_whole(n) & (n >= 1)),
    **dict.fromkeys(("seed", "step"), _WHOLE),
    **dict.fromkeys(("lr", "weight", "std"), _NOT_NEGATIVE),
    **dict.fromkeys(("value", "train_value", "alpha"), _FINITE),
}
WHOLE_ROLES = ("rank", "seed", "step", "std_seeds")


@dataclass(frozen=True, slots=True)
class Evaluations:
    """The rows of a table as numbers: an evaluation of a training, or the score of one of its examples.

    `trainings`, `steps` and `examples` are indices of `keys`, `step_numbers` and `example_names`, which are sorted.
    """

    values: Floats  # [rows] NaN: no value
    ranks: Floats  # [rows]
    trainings: Codes  # [rows]
    steps: Codes  # [rows]
    examples: Codes  # [rows]
    keys: list[tuple[int, float, int]]  # rank, learning rate, seed
    step_numbers: Floats
    example_names: list[str]

    def describe_training(self, training: int) -> str:
        rank, rate, seed = self.keys[training]
        return f"rank {rank}{f', lr {rate:g}' if rate else ''}, seed {seed}"


def number_evaluations(table: Table, roles: Roles) -> Evaluations:
    """Convert the rows of a table to numbers.

    Raises:
        ResultsError: a cell that is not allowed, or an example without a name.
    """
    rank_numbers, ranks = _encode_numbers(table, roles, "rank")
    rates, rate_codes = _encode_numbers(table, roles, "lr")
    rate_codes = np.where(rank_numbers[ranks] == 0, 0, rate_codes)  # the base model is not trained
    seeds, seed_codes = _encode_numbers(table, roles, "seed")
    step_numbers, steps = _encode_numbers(table, roles, "step")
    example_names, examples = encode_texts(table, roles, "example")
    combined = (ranks * len(rates) + rate_codes) * len(seeds) + seed_codes
    combinations, trainings = np.unique(combined, return_inverse=True)
    settings, seed_indices = np.divmod(combinations, len(seeds))
    keys = [
        (int(rank_numbers[setting // len(rates)]), float(rates[setting % len(rates)]), int(seeds[seed]))
        for setting, seed in zip(settings, seed_indices, strict=True)
    ]
    values = read_rows(table, roles, "value")
    return Evaluations(values, rank_numbers[ranks], trainings, steps, examples, keys, step_numbers, example_names)


def read_rows(table: Table, roles: Roles, role: str) -> Floats:
    """Return the number of each row; NaN for a blank or infinite one, and everywhere if no column has the role."""
    name = roles.columns.get(role)
    if name is None:
        return np.full(table.num_rows, np.nan)
    numbers = _read_cells(table, roles, role)
    return np.where(np.isinf(numbers), np.nan, numbers)[table.columns[name].codes]


def _read_cells(table: Table, roles: Roles, role: str) -> Floats:
    """Return the number in each cell of a role's column; NaN for blank cells."""
    name = roles.columns[role]
    allowed, is_allowed = LIMITS[role]
    cells, parsed = table.columns[name].cells, table.parse_numbers(name)
    if role in WHOLE_ROLES:  # `1,000` and `1.000` are a thousand in some countries
        parsed = [number if _is_integer(cell) else None for cell, number in zip(cells, parsed, strict=True)]
    numbers = np.array([np.inf if number is None else number for number in parsed])
    is_missing = np.array([number is None for number in parsed])
    invalid = np.flatnonzero(is_missing | ~(np.isnan(numbers) | is_allowed(numbers)))
    if len(invalid):
        row, code = min((table.find_row(name, int(code)), int(code)) for code in invalid)
        title = name if role == "value" else "learning rate" if role == "lr" else role
        raise ResultsError(
            f"{table.describe_row(row)}: {title} {quote_value(cells[code], 40)} is not allowed: give {allowed}"
            f"{_suggest_notation(str(cells[code]).strip())}"
        )
    return numbers


def _is_integer(cell: Any) -> bool:
    return not isinstance(cell, str) or is_blank(cell) or cell.strip().removesuffix(".0").isdecimal()


def _suggest_notation(text: str) -> str:
    if text.endswith("%"):
        return "; write it without the percent sign, in every row alike"
    if text.lower() in ("true", "false"):
        return "; write 1 and 0 where a right answer counts"
    return "; write it with a decimal point, and thousands without a comma" if "," in text else ""


def _encode_numbers(table: Table, roles: Roles, role: str) -> tuple[Floats, Codes]:
    """Return the sorted numbers of a role and the index of each row's number. Blank cells count as 0, which is the first."""
    name = roles.columns.get(role)
    if name is None:
        return np.zeros(1), np.zeros(table.num_rows, dtype=np.int64)
    numbers = np.append(np.nan_to_num(_read_cells(table, roles, role)), 0.0)
    values, codes = np.unique(numbers, return_inverse=True)
    return values, codes[table.columns[name].codes]


def encode_texts(table: Table, roles: Roles, role: str) -> tuple[list[str], Codes]:
    """Return the sorted texts of a role and the index of each row's text.

    Raises:
        ResultsError: a cell that is blank, or a placeholder such as `n/a`.
    """
    name = roles.columns.get(role)
    if name is None:
        return [""], np.zeros(table.num_rows, dtype=np.int64)
    column = table.columns[name]
    texts = {cell: str(cell).strip() for cell in set(column.cells)}
    if any(map(is_blank, texts)):
        row = min(table.find_row(name, code) for code, cell in enumerate(column.cells) if is_blank(cell))
        raise ResultsError(
            f"{table.describe_row(row)}: the {role} {quote_value(table.get_cell(name, row), 40)} in column {name} is no name; name the {role} "
            f"of every row, or leave the column out with --ignore {name}"
        )
    names = sorted(set(texts.values()))
    codes_by_name = {text: code for code, text in enumerate(names)}
    codes = {cell: codes_by_name[text] for cell, text in texts.items()}
    return names, np.fromiter(map(codes.__getitem__, column.cells), np.int64, len(column.cells))[column.codes]
