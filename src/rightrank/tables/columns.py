"""A table of results as columns.

A column stores each distinct cell once, and for each row the index of its cell. So cells that recur are converted and compared once, and a
table of a million rows takes little time and memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rightrank.schema.errors import ResultsError, quote_value, suggest_name

BLANK_TEXTS = {"", "-", "–", "—", "none", "null", "n/a", "na", "nan", "nat", "<na>"}  # texts of empty cells
MAX_NAMES = 12
Codes: TypeAlias = "NDArray[np.int64]"
Mask: TypeAlias = "NDArray[np.bool_]"


@dataclass(frozen=True, slots=True)
class Column:
    """The cell of a row is `cells[codes[row]]`: a text, a number or None."""

    cells: list[Any]
    codes: Codes  # [rows]

    def select(self, rows: NDArray[Any]) -> Column:
        """Return the column of some rows, with the cells that occur in them."""
        used, codes = np.unique(self.codes[rows], return_inverse=True)
        return Column([self.cells[code] for code in used.tolist()], codes)

    def test(self, is_true: Callable[[Any], bool]) -> Mask:
        """Return for each row whether a condition holds for its cell."""
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
        """Return the table of some rows: a mask, or their indices."""
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
    """Join names with commas and shorten long lists."""
    text = ", ".join(names[:MAX_NAMES])
    return f"{text}, … ({len(names)} in all)" if len(names) > MAX_NAMES else text or "none"
