"""The matplotlib backend: SVG and PNG files, and SVG elements for the report, in the page's colours."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from math import ceil
from pathlib import Path
from textwrap import wrap
from typing import Any

from rightrank.data.files import replacing, write_text
from rightrank.report.figure import AnyFigure, Band, Figure, HeatMap, Level, Mark, Series, Tone, to_csv
from rightrank.report.format import cell_text, visible
from rightrank.schema.errors import SettingsError

# Colours by role; inside the report, variables of the style sheet replace them.
INK, FAINT, LINE = "#1d2b34", "#5b6b74", "#d6dde1"
TONES: dict[str, str] = {"main": "#1c5d7f", "second": "#8a5a00", "accent": "#b5402a", "faint": FAINT}
SEQUENCE = (
    "#3b528b",
    "#c2571a",
    "#21756b",
    "#8e3b8a",
    "#7a6a00",
    "#b3344f",
    "#2f6fb0",
    "#5c7f1e",
    "#6a4c93",
    "#444444",
)
BAND = "#2a9d90"
VARIABLES = {INK: "--ink", FAINT: "--faint", LINE: "--line", BAND: "--band"} | {
    colour: f"--{name}" for name, colour in TONES.items() if name != "faint"
}
VARIABLES |= {colour: f"--s{place}" for place, colour in enumerate(SEQUENCE)}
MAX_LABELS = 12
SIZE = (7.0, 4.0)  # inches, of a plot without its legend; a heat map grows with its rows and columns
NARROW = (5.0, 3.1)  # of a plot that takes half a page, so that its letters stay readable there
PAGE_WIDE = {"rank_curve": (6.0, 3.4)}  # those that take its whole width
LEGEND_LINE = 0.19  # inches, the height of a line of the legend; LEGEND_LETTER the mean width of a letter
LEGEND_LETTER = 0.064
TITLE_LINE, TITLE_LETTER = 0.2, 0.095  # the same of the title
RING: dict[str, Any] = {"ms": 14, "mfc": "none", "mew": 2.2}
MAX_LABELLED_CELLS = 1000  # of a heat map; a larger one shows colours alone, and its CSV holds the numbers


def draw(figure: AnyFigure, image_format: str, size: tuple[float, float] = SIZE) -> bytes:
    """The figure as `svg` or `png` bytes; the same figure gives the same bytes. The legend is below the plot.

    Args:
        figure: what to draw.
        image_format: `svg` or `png`.
        size: width and height of a plot in inches; the legend adds to the height, and a heat map has its own size.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    with rc_context(_style(figure.name)), warnings.catch_warnings():
        # for a name in letters that the font lacks; the viewer of an SVG uses its own fonts
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        width, height = _size(figure, size)
        below = _legend_shape(figure, width)[1] * LEGEND_LINE if isinstance(figure, Figure) else 0.0
        title = wrap(visible(figure.title), int((width - 1.05) / TITLE_LETTER))
        above = TITLE_LINE * (len(title) - 1)
        height += below + above
        canvas = Canvas(figsize=(width, height))
        # fixed margins in inches: a layout solver triples the time
        canvas.subplots_adjust(
            left=0.84 / width, right=1 - 0.21 / width, top=1 - (0.4 + above) / height, bottom=(0.52 + below) / height
        )
        axes: Any = canvas.add_subplot()
        if isinstance(figure, HeatMap):
            _draw_map(axes, figure)
        else:
            _draw_figure(axes, figure)
        axes.set_title("\n".join(title), fontsize=11, loc="left", color=INK)
        buffer = BytesIO()
        metadata: Any = {"Date": None} if image_format == "svg" else {"Software": None}
        canvas.savefig(buffer, format=image_format, dpi=144, metadata=metadata, transparent=image_format == "svg")
    return buffer.getvalue()


def _legend_shape(figure: Figure, width: float) -> tuple[int, int]:
    """Columns and lines of the legend; no line for a single entry."""
    labels = list(dict.fromkeys(series.label for series in figure.series))[:MAX_LABELS]
    parts: tuple[Band | Level | Mark, ...] = (*figure.bands, *figure.levels, *figure.marks)
    labels += [part.label for part in parts if part.label]
    if len(labels) < 2:
        return 1, 0
    columns = int((width - 0.3) / (0.55 + LEGEND_LETTER * max(map(len, labels))))
    columns = max(1, min(columns, len(labels)))
    return columns, ceil(len(labels) / columns)


def _draw_legend(axes: Any, figure: Figure) -> None:
    """The legend at the foot of the canvas, where it hides no point."""
    columns, lines = _legend_shape(figure, axes.figure.get_figwidth())
    if lines == 0:
        return
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0.25, lines * LEGEND_LINE),  # in inches
        bbox_transform=axes.figure.dpi_scale_trans,
        frameon=False,
        fontsize=8,
        labelspacing=0.65,
        columnspacing=1.2,
        borderaxespad=0,
        borderpad=0,
        ncols=columns,
    )


@lru_cache(maxsize=64)  # the report is rewritten after every trial, and most of its figures stay the same
def inline_svg(figure: AnyFigure) -> str:
    """The SVG element in the page's colours, hidden from screen readers, which read the page's own `alt` text."""
    text = scalable_svg(figure, PAGE_WIDE.get(figure.name, NARROW))
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var({name})")
    prefix = figure.name.replace("_", "")  # ids must be unique within the page
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    return text.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)


def scalable_svg(figure: AnyFigure, size: tuple[float, float] = SIZE) -> str:
    """The SVG element without a width and height of its own, so that it fits the box around it."""
    text = draw(figure, "svg", size).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)


def _size(figure: AnyFigure, size: tuple[float, float]) -> tuple[float, float]:
    if isinstance(figure, Figure):
        return size
    column = 0.1 * max(8, *map(len, figure.column_names))
    return max(SIZE[0], 1.05 + column * len(figure.column_names)), max(SIZE[1], 0.92 + 0.32 * len(figure.row_names))


def _style(name: str) -> Any:
    return {
        "svg.hashsalt": name,
        "svg.fonttype": "none",  # keeps text as text: smaller, and searchable in the browser
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10,
        "text.parse_math": False,  # a $ in a metric's name is no formula
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
    }


def colour_of(tone: Tone) -> str:
    return SEQUENCE[tone % len(SEQUENCE)] if isinstance(tone, int) else TONES[tone]


def _draw_figure(axes: Any, figure: Figure) -> None:
    for band in figure.bands:
        axes.axhspan(band.low, band.high, color=BAND, alpha=0.25, lw=0, label=visible(band.label))
    for level in figure.levels:
        axes.axhline(level.value, color=FAINT, ls=":", lw=1.3, label=visible(level.label) or None)
    named: set[str] = set()
    for series in figure.series:
        _draw_series(axes, series, labelled=series.label not in named and len(named) < MAX_LABELS)
        named.add(series.label)
    for mark in figure.marks:
        colour = colour_of(mark.tone)
        axes.plot([mark.x], [mark.y], "o", mec=colour, **RING)
        axes.plot([], [], "o", mec=colour, **(RING | {"ms": 8}), label=visible(mark.label))  # smaller, in the legend
    _set_scale(axes, "x", figure.x.scale, figure.x.ticks)
    _set_scale(axes, "y", figure.y.scale, figure.y.ticks)
    if figure.x.limits is not None:
        axes.set_xlim(*figure.x.limits)
    if figure.y.limits is not None:
        axes.set_ylim(*figure.y.limits)
    axes.set_xlabel(visible(figure.x.label))
    axes.set_ylabel(visible(figure.y.label))
    _draw_legend(axes, figure)


def _draw_series(axes: Any, series: Series, labelled: bool) -> None:
    colour = colour_of(series.tone)
    if series.high:
        below = [max(0.0, y - low) for y, low in zip(series.y, series.low, strict=True)]
        above = [max(0.0, high - y) for y, high in zip(series.y, series.high, strict=True)]
        axes.errorbar(series.x, series.y, yerr=[below, above], fmt="none", ecolor=colour, alpha=0.5, capsize=4)
    label = visible(series.label) if labelled else None
    style = "--" if series.dashed else "-"
    if series.kind == "step":
        axes.step(series.x, series.y, where="post", color=colour, lw=2, ls=style, label=label)
    else:
        axes.plot(
            series.x,
            series.y,
            color=colour,
            lw=1.8,
            ls="" if series.kind == "points" else style,
            marker="" if series.kind == "line" else "o",
            ms=5,
            label=label,
        )


def _set_scale(axes: Any, which: str, scale: str, ticks: tuple[float, ...]) -> None:
    if scale != "linear":
        from matplotlib.ticker import NullFormatter, StrMethodFormatter

        getattr(axes, f"set_{which}scale")("log", base=2 if scale == "log2" else 10)
        getattr(axes, f"{which}axis").set_major_formatter(StrMethodFormatter("{x:g}"))
        getattr(axes, f"{which}axis").set_minor_formatter(NullFormatter())  # else raw powers, such as 6×10^{0}
    if ticks:
        shown = ticks if len(ticks) <= MAX_LABELS else ticks[:: ceil(len(ticks) / MAX_LABELS)]
        getattr(axes, f"set_{which}ticks")(shown, [f"{tick:g}" for tick in shown])
        axes.minorticks_off()


def _draw_map(axes: Any, figure: HeatMap) -> None:
    shades = [[figure.shade(value) for value in row] for row in figure.values]
    colours = [[-0.25 if shade is None else shade for shade in row] for row in shades]
    axes.imshow(colours, cmap="GnBu", vmin=-0.25, vmax=1.6, aspect="auto")
    axes.set_xticks(range(len(figure.column_names)), [visible(name) for name in figure.column_names])
    axes.set_yticks(range(len(figure.row_names)), [visible(name) for name in figure.row_names])
    axes.set_xlabel(figure.column_label)
    axes.set_ylabel(figure.row_label)
    if len(figure.row_names) * len(figure.column_names) > MAX_LABELLED_CELLS:
        return
    for row, values in enumerate(figure.values):
        for column, value in enumerate(values):
            text = figure.notes[row][column] if value is None else cell_text(value)
            weight = "bold" if figure.best[row] == column else "normal"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=INK, fontweight=weight)


IMAGE_FORMATS = ("svg", "png")


def write_figures(folder: Path, figures: Sequence[AnyFigure]) -> None:
    """`folder/<name>.svg`, `.png` and `.csv` of each figure. Each file is replaced as a whole."""
    for figure in figures:
        for image_format in IMAGE_FORMATS:
            with replacing(folder / f"{figure.name}.{image_format}") as path:
                path.write_bytes(draw(figure, image_format))
        write_text(folder / f"{figure.name}.csv", to_csv(figure))


def image_format_of(path: Path) -> str:
    """The image format that the file's ending names.

    Raises:
        SettingsError: neither `.svg` nor `.png`.
    """
    image_format = path.suffix.lower().lstrip(".")
    if image_format not in IMAGE_FORMATS:
        raise SettingsError(f"--plot {path}: give a file that ends in .svg or .png")
    return image_format


def write_plot(figure: AnyFigure, path: Path) -> None:
    """Draw one figure to `path`, in the format that its ending names.

    Raises:
        SettingsError: another ending, or the file can't be written.
    """
    image = draw(figure, image_format_of(path))
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(image)
    except OSError as error:
        raise SettingsError(f"--plot {path}: can't write there ({error.strerror or error})") from None
