"""Figures as plain data: what is drawn, its words and its numbers. Backends draw it, tests check it.

A `Figure` is drawn by `draw` (SVG and PNG), by the report's script (interactive), and written by `to_csv`.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Literal, TypeAlias

Scale: TypeAlias = Literal["linear", "log2", "log10"]
Kind: TypeAlias = Literal["line", "points", "both", "step"]
Tone: TypeAlias = Literal["main", "second", "accent", "faint"] | int  # an integer: place in a sequence of colours
Number: TypeAlias = float | int
Cell: TypeAlias = str | float | int | None


@dataclass(frozen=True, slots=True)
class Axis:
    label: str
    scale: Scale = "linear"
    ticks: tuple[Number, ...] = ()  # empty: the backend chooses
    limits: tuple[float, float] | None = None  # None: what is drawn, and a little room


@dataclass(frozen=True, slots=True)
class Series:
    """Points in the order of x; `low` and `high` are interval ends, empty where there are none.

    Series of one label share an entry of the legend.
    """

    label: str
    x: tuple[Number, ...]
    y: tuple[Number, ...]
    low: tuple[Number, ...] = ()
    high: tuple[Number, ...] = ()
    kind: Kind = "both"
    dashed: bool = False
    tone: Tone = "main"


@dataclass(frozen=True, slots=True)
class Band:
    """A horizontal stripe."""

    label: str
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal line."""

    label: str
    value: float


@dataclass(frozen=True, slots=True)
class Mark:
    """A ring around one point."""

    label: str
    x: float
    y: float
    tone: Tone = "accent"


@dataclass(frozen=True, slots=True)
class Figure:
    """Everything that a plot shows. `name` is its file name; `alt` says it in words."""

    name: str
    title: str
    alt: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    bands: tuple[Band, ...] = ()
    levels: tuple[Level, ...] = ()
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A table of numbers drawn as colours: `values[row][column]`, None where there is none."""

    name: str
    title: str
    alt: str
    row_label: str
    column_label: str
    row_names: tuple[str, ...]
    column_names: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    notes: tuple[tuple[str, ...], ...]  # beside the value: "no result", "×2" for two seeds
    best: tuple[int | None, ...]  # the best column of each row
    lower_is_better: bool

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.row_label, *self.column_names)

    @property
    def rows(self) -> tuple[tuple[Cell, ...], ...]:
        return tuple((name, *values) for name, values in zip(self.row_names, self.values, strict=True))

    def shade(self, value: float | None) -> float | None:
        """0 for the worst value of the map, 1 for the best."""
        known = [v for row in self.values for v in row if v is not None]
        if value is None or max(known) == min(known):
            return None
        share = (value - min(known)) / (max(known) - min(known))
        return 1 - share if self.lower_is_better else share


def best_column(values: Sequence[float | None], lower_is_better: bool) -> int | None:
    """The place of the best value, the first of equals; None where there is none."""
    known = [(value if lower_is_better else -value, column) for column, value in enumerate(values) if value is not None]
    return min(known)[1] if known else None


AnyFigure: TypeAlias = Figure | HeatMap


def to_csv(figure: AnyFigure) -> str:
    """The figure's numbers, one header line first."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(figure.columns)
    writer.writerows(figure.rows)
    return text.getvalue()


CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
# Invisible characters that could disguise text: DEL, C1 controls, bidirectional marks, separators, surrogates.
HIDDEN = {
    0x7F: 0x2421,
    **dict.fromkeys(
        [*range(0x80, 0xA0), *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070)], 0xFFFD
    ),
    **dict.fromkeys([*range(0xD800, 0xE000), 0xFEFF, 0xFFFE, 0xFFFF], 0xFFFD),
}


def visible(text: str) -> str:
    """Control characters as the pictures of them: text from data can't change how the page reads."""
    return text.translate(CONTROL_PICTURES | HIDDEN)
