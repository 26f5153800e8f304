"""The terminal backend: the curve so far, and heat maps as shaded cells."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from typing import TYPE_CHECKING, TypeAlias

from rightrank.report.figure import HeatMap
from rightrank.report.format import short, visible

if TYPE_CHECKING:
    from rich.text import Text

MAX_CURVE_WIDTH, CURVE_HEIGHT = 72, 14  # characters
Points: TypeAlias = Sequence[tuple[int, float]]  # rank and value, by ascending rank
SHADES = (17, 18, 24, 30, 65, 101, 143, 185, 227)  # of the 256 terminal colours, dark to light


def terminal_curve(points: Points, width: int, colour: bool, truncated: Points = ()) -> str:
    """Values against the logarithm of the rank as text, at most `width` characters wide; empty below two ranks.

    `points` are trained adapters (●), `truncated` those truncated from a higher rank (○).
    """
    ranks = sorted({rank for rank, _ in (*points, *truncated)})
    if len(ranks) < 2:
        return ""
    import plotext

    plotext.clear_figure()
    plotext.plot_size(min(width, MAX_CURVE_WIDTH), CURVE_HEIGHT)
    for series, marker in ((truncated, "○"), (points, "●")):
        if not series:
            continue
        positions, values = [log2(rank) for rank, _ in series], [value for _, value in series]
        plotext.plot(positions, values, marker="braille")
        plotext.scatter(positions, values, marker=marker)
    plotext.xticks([log2(rank) for rank in ranks], [str(rank) for rank in ranks])
    plotext.xlabel("LoRA rank (● trained, ○ truncated)" if truncated else "LoRA rank")
    plotext.theme("clear")
    text: str = plotext.build()
    return text if colour else plotext.uncolorize(text)


def terminal_map(figure: HeatMap) -> Text:
    """The heat map in shaded cells, each with its value."""
    from rich.text import Text

    width = max(6, *map(len, figure.column_names)) + 1
    text = Text(f"{visible(figure.title)}\n", style="bold")
    text.append(f"{figure.row_label:>6} " + "".join(f"{name:>{width}}" for name in figure.column_names) + "\n")
    for name, row in zip(figure.row_names, figure.values, strict=True):
        text.append(f"{name:>6} ")
        for value in row:
            if value is None:
                text.append(" " * width)
                continue
            shade = figure.shade(value)
            share = 0.5 if shade is None else shade
            colour = SHADES[min(int(share * len(SHADES)), len(SHADES) - 1)]
            ink = "white" if share < 0.5 else "black"
            text.append(f"{short(value):>{width}}", style=f"{ink} on color({colour})")
        text.append("\n")
    return text
