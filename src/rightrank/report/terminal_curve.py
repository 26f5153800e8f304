"""Draw values against the logarithm of the rank as text: with a frame, or in a few rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, log2, log10
from textwrap import wrap
from typing import TypeAlias

MAX_CURVE_WIDTH, CURVE_ROWS = 72, 10  # characters
Points: TypeAlias = Sequence[tuple[int, float]]  # rank and value, by ascending rank


@dataclass(frozen=True, slots=True)
class _CurveGrid:
    """The cells of a drawing, and the texts at its axes."""

    rows: list[str]
    ticks: dict[int, str]  # by row
    margin: int  # the width of the ticks
    rank_labels: str  # of the horizontal axis
    columns: int
    has_both: bool  # whether a trained and a truncated adapter share a cell

    def format_rows(self, end: str) -> list[str]:
        """Return the rows with the vertical axis before them and `end` after them."""
        return [
            f"{self.ticks.get(row, ''):>{self.margin}}{'┤' if row in self.ticks else '│'}{text}{end}".rstrip()
            for row, text in enumerate(self.rows)
        ]


def draw_terminal_curve(points: Points, width: int, truncated: Points = (), *, label: str) -> str:
    """Draw values against the logarithm of the rank in a frame, at most `width` characters wide.

    Args:
        points: trained adapters (●).
        truncated: adapters truncated from a higher rank (○; ◉ where both share a cell).
        label: the name of the values, with the better direction.

    Returns:
        The drawing, or "" if there are fewer than two ranks.
    """
    grid = _build_grid(points, truncated, width, CURVE_ROWS, tick_distance=3)
    if grid is None:
        return ""
    margin, columns = grid.margin, grid.columns
    legend = _format_legend(grid) if truncated else ""
    legend = f" ({legend})" if legend and columns > len(legend) + 12 else ""
    return "\n".join(
        [
            *wrap(label, width),
            f"{'':{margin}}┌{'─' * columns}┐",
            *grid.format_rows("│"),
            f"{'':{margin}}└{'─' * columns}┘",
            grid.rank_labels,
            f"{'':{margin + 1}}{'LoRA rank' + legend:^{columns}}".rstrip(),
        ]
    )


def draw_small_curve(points: Points, width: int, rows: int, truncated: Points = (), *, label: str) -> list[str]:
    """Draw the same values without a frame, as `rows` lines: the label, the drawing and the ranks.

    Returns:
        The lines; none if there are fewer than two ranks, or too few rows for a drawing.
    """
    grid = _build_grid(points, truncated, width, rows - 2, tick_distance=rows - 3) if rows > 4 else None
    if grid is None:
        return []
    legend = f"{label}; {_format_legend(grid)}" if truncated else label
    name = "rank" if grid.margin > len("rank") else ""
    return [
        legend if len(legend) <= width else label[:width],
        *grid.format_rows(""),
        f"{name:>{grid.margin}}{grid.rank_labels[grid.margin :]}",
    ]


def _format_legend(grid: _CurveGrid) -> str:
    return f"● trained, ○ truncated{', ◉ both' if grid.has_both else ''}"


def _build_grid(points: Points, truncated: Points, width: int, num_rows: int, tick_distance: int) -> _CurveGrid | None:
    """Return the cells and the axes; None if there are fewer than two ranks."""
    ranks = sorted({rank for rank, _ in (*points, *truncated)})
    if len(ranks) < 2:
        return None
    values = [value for _, value in (*points, *truncated)]
    low, span = min(values), (max(values) - min(values)) or abs(values[0]) or 1.0
    tick_values = {row: low + span * (1 - row / (num_rows - 1)) for row in range(0, num_rows, tick_distance)}
    # Use two digits of the distance between ticks, so that all texts differ, and trailing zeros, so that they line up.
    digits = max(4, 2 + floor(log10(max(map(abs, tick_values.values())))) - floor(log10(span / (len(tick_values) - 1))))
    ticks = {row: f"{value:#.{digits}g}".rstrip(".") for row, value in tick_values.items()}
    margin = max(map(len, ticks.values()))
    columns = max(len(ranks), min(width, MAX_CURVE_WIDTH) - margin - 1 - len(str(ranks[-1])))
    column = {rank: round((columns - 1) * log2(rank / ranks[0]) / log2(ranks[-1] / ranks[0])) for rank in ranks}
    truncated_cells, trained_cells = (
        {(round((num_rows - 1) * (1 - (value - low) / span)), column[rank]) for rank, value in adapters}
        for adapters in (truncated, points)
    )
    both = truncated_cells & trained_cells
    cells = dict.fromkeys(truncated_cells, "○") | dict.fromkeys(trained_cells, "●") | dict.fromkeys(both, "◉")
    rows = ["".join(cells.get((row, x), " ") for x in range(columns)) for row in range(num_rows)]
    labels = " " * (margin + 1) + _format_rank_labels({column[rank]: str(rank) for rank in ranks})
    return _CurveGrid(rows, ticks, margin, labels, columns, bool(both))


def _format_rank_labels(names: Mapping[int, str]) -> str:
    """Write each label at its column; a label that would touch the one before it is left out."""
    line = ""
    for column, name in names.items():
        if not line or column > len(line):
            line = line.ljust(column) + name
    return line
