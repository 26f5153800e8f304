"""Draw values against the logarithm of the rank as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor, log2, log10
from typing import TypeAlias

MAX_CURVE_WIDTH, CURVE_LINES = 72, 12  # characters, and lines with the label and the ranks
Points: TypeAlias = Sequence[tuple[int, float]]  # rank and value, by ascending rank


def draw_terminal_curve(
    points: Points, width: int, truncated: Points = (), *, label: str, num_lines: int = CURVE_LINES
) -> list[str]:
    """Draw values against the logarithm of the rank in `num_lines` lines: the label, the drawing and the ranks.

    Args:
        points: trained adapters (●).
        width: the characters of a line.
        truncated: adapters truncated from a higher rank (○; ◉ where both share a cell).
        label: the name of the values, with the better direction.

    Returns:
        The lines; none if there are fewer than two ranks, or too few lines for a drawing.
    """
    ranks = sorted({rank for rank, _ in (*points, *truncated)})
    num_rows = num_lines - 2
    if len(ranks) < 2 or num_rows < 3:
        return []
    values = [value for _, value in (*points, *truncated)]
    low, span = min(values), (max(values) - min(values)) or abs(values[0]) or 1.0
    tick_distance = 3 if num_rows > 6 and num_rows % 3 == 1 else num_rows - 1
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
    legend = f"{label}; ● trained, ○ truncated{', ◉ both' if both else ''}" if truncated else label
    name = "rank" if margin > len("rank") else ""
    return [
        legend if len(legend) <= width else label[:width],
        *(
            f"{ticks.get(row, ''):>{margin}}{'┤' if row in ticks else '│'}{text}".rstrip()
            for row, text in enumerate(rows)
        ),
        f"{name:>{margin}} {_format_rank_labels({column[rank]: str(rank) for rank in ranks})}",
    ]


def _format_rank_labels(names: Mapping[int, str]) -> str:
    """Write each label at its column; a label that would touch the one before it is left out."""
    line = ""
    for column, name in names.items():
        if not line or column > len(line):
            line = line.ljust(column) + name
    return line
