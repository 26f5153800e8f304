"""A figure of the report: its numbers as a table, and a function that draws them on matplotlib axes.

Matplotlib is imported when a figure is drawn. Without it, a figure still has its numbers.
"""

from __future__ import annotations

import csv
import warnings
from base64 import b64encode
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, TypeAlias

from rightrank.data.files import replace_file, write_text
from rightrank.report.format import make_visible
from rightrank.schema.errors import MissingExtraError, SettingsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

TableCell: TypeAlias = str | float | int | None
FORMATS = ("svg", "pdf", "png")
INSTALL_HINT = "figures need matplotlib; install it with: pip install 'rightrank[plots]'"
WIDTH, HEIGHT, LEGEND_ROW_HEIGHT = 5.0, 3.4, 0.21  # inches
TITLE_WIDTH, LABEL_WIDTH, LEGEND_WIDTH = 50, 38, 58  # characters
PNG_DPI = 200
MAX_TICKS = 10  # of a logarithmic axis
RANK = "LoRA rank"  # the label of an axis
Interval: TypeAlias = tuple[float, float, float, float]  # x, the value, and both ends of its whisker
# The colours of a drawing on a light page, which files have, and on a dark one: those of the style sheet.
LIGHT = {
    "paper": "#ffffff", "ink": "#1d2b34", "faint": "#5b6b74", "line": "#d6dde1", "s0": "#1c5d7f", "s1": "#c2571a", "s2": "#21756b",
    "s3": "#8e3b8a", "s4": "#7a6a00", "s5": "#b3344f", "s6": "#2f6fb0", "s7": "#5c7f1e", "s8": "#6a4c93", "s9": "#444444",
}  # fmt: skip
DARK = {
    "paper": "#12181b", "ink": "#e7eef1", "faint": "#a4b4bc", "line": "#37444a", "s0": "#6cb8e0", "s1": "#f0935a", "s2": "#5fc4b6",
    "s3": "#d58ad1", "s4": "#d1be4a", "s5": "#f08aa0", "s6": "#77b4f0", "s7": "#a6cc5f", "s8": "#b79be0", "s9": "#c0c0c0",
}  # fmt: skip
STYLE = {
    "svg.fonttype": "none", "font.size": 11, "savefig.facecolor": "auto", "axes.facecolor": "none", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "axes.titlelocation": "left",
    "axes.titlesize": 12, "axes.titleweight": "bold", "axes.formatter.useoffset": False, "legend.frameon": False, "legend.fontsize": 10,
}  # fmt: skip
COLOURED = {
    "paper": ("figure.facecolor",), "line": ("grid.color",), "ink": ("text.color", "axes.titlecolor", "axes.labelcolor"),
    "faint": ("axes.edgecolor", "xtick.color", "ytick.color"),
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A plot and its numbers.

    `name` is its file name, `rows` are its numbers under the headings `columns`, and `draw` draws it on axes.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[TableCell, ...]]
    draw: Callable[[Axes], object]

    def plot(self, ax: Axes) -> Axes:
        """Draw the figure with its title, labels and legend; return the axes."""
        title, x_label, y_label = map(escape_label, (self.title, self.x_label, self.y_label))
        ax.set(title=fill(title, TITLE_WIDTH), xlabel=x_label, ylabel=fill(y_label, LABEL_WIDTH))
        self.draw(ax)
        if len(ax.get_legend_handles_labels()[1]) > 1:
            ax.legend()
        return ax

    @cached_property
    def svg(self) -> str:
        """Return the drawing as an SVG file, the same text for the same figure; empty if matplotlib is not installed."""
        return self._draw_svg(LIGHT)

    @property
    def images(self) -> tuple[str, str]:
        """Return the addresses of the drawing in the page, on a light and on a dark page."""
        return encode_image(self.svg), encode_image(self._draw_svg(DARK))

    def _draw_svg(self, colours: Mapping[str, str]) -> str:
        if not is_matplotlib_installed():
            return ""
        drawing = StringIO()
        with self._open_canvas(colours) as canvas:
            canvas.savefig(drawing, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return drawing.getvalue()

    def save(self, path: Path) -> None:
        """Write the drawing as PDF or PNG, in the format that the file's ending names."""
        with replace_file(path) as temporary, self._open_canvas(LIGHT) as canvas:
            metadata = {"CreationDate": None} if path.suffix == ".pdf" else {"Software": None}
            canvas.savefig(temporary, format=path.suffix[1:], dpi=PNG_DPI, metadata=metadata)

    @contextmanager
    def _open_canvas(self, colours: Mapping[str, str]) -> Iterator[Canvas]:
        """Draw the figure in the style of the report, with its legend below the axes."""
        from matplotlib import rc_context, rcParamsDefault
        from matplotlib.figure import Figure as Canvas
        from matplotlib.rcsetup import cycler

        cycle = cycler(color=[colours[f"s{number}"] for number in range(10)])
        coloured = {name: colours[colour] for colour, names in COLOURED.items() for name in names}
        defaults = {name: value for name, value in rcParamsDefault.items() if not name.startswith("backend")}
        style: Any = {**defaults, **STYLE, **coloured, "axes.prop_cycle": cycle, "svg.hashsalt": self.name}
        with rc_context(style), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # The font that measures a text may lack some of its letters.
            canvas = Canvas(figsize=(WIDTH, HEIGHT), layout="constrained")
            ax = self.plot(canvas.subplots())
            if (legend := ax.get_legend()) is not None:
                legend.remove()
                handles, labels = ax.get_legend_handles_labels()
                columns = max(1, min(4, len(labels), LEGEND_WIDTH // (max(map(len, labels)) + 7)))
                canvas.legend(handles, labels, loc="outside lower left", ncols=columns)
                canvas.set_figheight(HEIGHT + LEGEND_ROW_HEIGHT * -(-len(labels) // columns))
            yield canvas


def encode_image(svg: str) -> str:
    """Return the address of an SVG drawing that is part of a page."""
    return f"data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}"


def is_matplotlib_installed() -> bool:
    return find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raise if figures cannot be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if not is_matplotlib_installed():
        raise MissingExtraError(INSTALL_HINT)


def escape_label(text: str) -> str:
    """Return text that matplotlib shows as it is: names from data contain no mathematics."""
    return make_visible(text).replace("$", r"\$")


def write_figures(folder: Path, figures: Sequence[Figure], formats: Collection[str] = ()) -> None:
    """Write the numbers of each figure as `folder/<name>.csv`, its drawing as SVG if matplotlib is installed, and in the requested formats.

    Raises:
        SettingsError: a format is neither pdf nor png.
        MissingExtraError: a requested format needs matplotlib, which is not installed.
    """
    unknown_format = next((suffix for suffix in formats if suffix not in FORMATS), None)
    if unknown_format is not None:
        raise SettingsError(
            f"{unknown_format!r} is not a supported figure format; give pdf, png or both (svg is always written)"
        )
    if formats:
        require_matplotlib()
    for figure in figures:
        numbers = StringIO()
        csv.writer(numbers, lineterminator="\n").writerows([figure.columns, *figure.rows])
        write_text(folder / f"{figure.name}.csv", numbers.getvalue())
        if figure.svg:
            write_text(folder / f"{figure.name}.svg", figure.svg)
        for suffix in formats:
            if suffix != "svg":
                figure.save(folder / f"{figure.name}.{suffix}")


def compute_limits(values: Collection[float], base: float | None = None) -> tuple[float, float]:
    """Return the limits of the y axis.

    They include all of `values`, and also the base model unless that would compress the values into less than a third of the axis.
    """
    low, high = min(values), max(values)
    value_range = (high - low) or abs(high) or 1.0
    if base is not None and max(high, base) - min(low, base) <= 3 * value_range:
        low, high = min(low, base), max(high, base)
    padding = 0.08 * ((high - low) or value_range)
    return low - padding, high + padding


def draw_points(ax: Axes, points: Sequence[Interval], label: str, colour: str, line: str = "-") -> None:
    """Draw points with whiskers and a line through them. A whisker includes its point."""
    x, y, low, high = zip(*points, strict=True)
    lengths = [[max(0.0, p[1] - min(p[2:])) for p in points], [max(0.0, max(p[2:]) - p[1]) for p in points]]
    options: dict[str, Any] = {"markersize": 5, "capsize": 4, "elinewidth": 1, "label": escape_label(label)}
    ax.errorbar(x, y, lengths if low != high else None, fmt=f"o{line}", color=colour, **options)


def draw_band(ax: Axes, first: float, second: float, label: str) -> None:
    ax.axhspan(min(first, second), max(first, second), facecolor="C2", alpha=0.25, linewidth=0, label=label)


def draw_ring(ax: Axes, x: float, y: float, label: str) -> None:
    """Draw a ring below the points."""
    style: Any = {"markerfacecolor": "none", "markersize": 13, "markeredgewidth": 2, "zorder": 1.5}
    ax.plot([x], [y], "o", color="C5", label=escape_label(label), **style)


def draw_share_axis(ax: Axes, base: float | None, reference: float) -> None:
    """Draw the share of the gain on the right: 0% at the base's value, 100% at the reference's; nothing without a gain."""
    if base is None or base == reference:
        return
    slope = 100 / (reference - base)

    def convert_to_share(values: Any) -> Any:
        return (values - base) * slope

    def convert_to_value(shares: Any) -> Any:
        return base + shares / slope

    axis = ax.secondary_yaxis("right", functions=(convert_to_share, convert_to_value))
    axis.set_ylabel("share of the gain, %")


def set_log_ticks(ax: Axes, dimension: str, values: Collection[float]) -> None:
    """Make an axis logarithmic, with a tick at each value. A value whose label would touch the previous one has no tick."""
    ticks: list[float] = []
    for value in sorted(set(values)):
        if not ticks or value / ticks[-1] >= 0.999 * (max(values) / min(values)) ** (1 / MAX_TICKS):
            ticks.append(value)
    set_scale, axis = (ax.set_xscale, ax.xaxis) if dimension == "x" else (ax.set_yscale, ax.yaxis)
    if len(ticks) == 1:  # matplotlib widens a range without an extent with a warning
        set_limits = ax.set_xlim if dimension == "x" else ax.set_ylim
        set_limits(ticks[0] / 2, ticks[0] * 2)
    set_scale("log")
    axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)
