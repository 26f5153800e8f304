"""The terminal backend: the curve so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import log2
from typing import TypeAlias

from rightrank.report.format import cell_text

MAX_CURVE_WIDTH, CURVE_ROWS = 72, 10  # characters
BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # the dots of a character, four rows of two
Points: TypeAlias = Sequence[tuple[int, float]]  # rank and value, by ascending rank


def terminal_curve(points: Points, width: int, truncated: Points = ()) -> str:
    """Values against the logarithm of the rank as text, at most `width` characters wide; empty below two ranks.

    `points` are trained adapters (●), `truncated` those truncated from a higher rank (○).
    """
    ranks = sorted({rank for rank, _ in (*points, *truncated)})
    if len(ranks) < 2:
        return ""
    values = [value for _, value in (*points, *truncated)]
    low, span = min(values), (max(values) - min(values)) or 1.0
    ticks = {row: cell_text(low + span * (1 - row / (CURVE_ROWS - 1))) for row in range(0, CURVE_ROWS, 3)}
    margin = max(map(len, ticks.values()))
    columns = max(len(ranks), min(width, MAX_CURVE_WIDTH) - margin - 1 - len(str(ranks[-1])))

    def column(rank: int) -> int:
        return round((columns - 1) * log2(rank / ranks[0]) / log2(ranks[-1] / ranks[0]))

    def places(series: Points) -> list[tuple[int, float]]:
        return [(column(rank), (CURVE_ROWS - 1) * (1 - (value - low) / span)) for rank, value in series]

    cells = _line(places(truncated)) | _line(places(points))
    for series, marker in ((truncated, "○"), (points, "●")):
        cells |= {(round(row), x): marker for x, row in places(series)}
    lines = [
        f"{ticks.get(row, ''):>{margin}}{'┤' if row in ticks else '│'}"
        + "".join(cells.get((row, x), " ") for x in range(columns))
        + "│"
        for row in range(CURVE_ROWS)
    ]
    frame = f"{'':{margin}}┌{'─' * columns}┐", f"{'':{margin}}└{'─' * columns}┘"
    legend = " (● trained, ○ truncated)" if truncated and columns > 33 else ""
    names = " " * (margin + 1) + _rank_names({column(rank): str(rank) for rank in ranks})
    return "\n".join(
        [frame[0], *lines, frame[1], names, f"{'':{margin + 1}}{'LoRA rank' + legend:^{columns}}".rstrip()]
    )


def _line(places: Sequence[tuple[int, float]]) -> dict[tuple[int, int], str]:
    """Braille characters along the straight lines between `places`: column and row, each with a fraction for its dots."""
    dots: dict[tuple[int, int], int] = {}
    for (left, upper), (right, lower) in pairwise(places):
        steps = max(2 * (right - left), round(4 * abs(lower - upper)), 1)
        for step in range(steps + 1):
            x = round(2 * left + 2 * (right - left) * step / steps)
            y = round(4 * (upper + (lower - upper) * step / steps) + 1.5)
            cell = (min(y // 4, CURVE_ROWS - 1), x // 2)
            dots[cell] = dots.get(cell, 0) | BRAILLE[y % 4][x % 2]
    return {cell: chr(0x2800 + bits) for cell, bits in dots.items()}


def _rank_names(names: Mapping[int, str]) -> str:
    """The names from their columns on; one that would touch the name before it is left out."""
    line = ""
    for column, name in names.items():
        if not line or column > len(line):
            line = line.ljust(column) + name
    return line
