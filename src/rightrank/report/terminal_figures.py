"""The terminal backend: the curve so far, and heat maps as shaded cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rightrank.report.figure import HeatMap
from rightrank.report.format import short, visible

if TYPE_CHECKING:
    from rich.text import Text

MAX_CURVE_WIDTH, CURVE_HEIGHT = 72, 14  # characters
SHADES = (17, 18, 24, 30, 65, 101, 143, 185, 227)  # of the 256 terminal colours, dark to light


def terminal_curve(points: list[tuple[int, float]], width: int, colour: bool) -> str:
    """Values against ranks as text, at most `width` characters wide; empty below two ranks."""
    if len(points) < 2:
        return ""
    import plotext

    positions = list(range(len(points)))
    plotext.clear_figure()
    plotext.plot_size(min(width, MAX_CURVE_WIDTH), CURVE_HEIGHT)
    plotext.plot(positions, [value for _, value in points], marker="braille")
    plotext.scatter(positions, [value for _, value in points], marker="●")
    plotext.xticks(positions, [str(rank) for rank, _ in points])
    plotext.xlabel("LoRA rank")
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
