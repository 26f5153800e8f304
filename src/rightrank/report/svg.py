"""Draw figures as SVG. The page embeds the drawing; a file adds the title, the legend and the colours.

Every series, band, level and mark is a group with its label in `data-label`. A series stores its numbers in `data-x` and
`data-y`, and the drawing stores its two scales in `data-axes`. The page's script reads nothing else.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from math import ceil, floor, log10
from pathlib import Path
from textwrap import wrap

from rightrank.data.files import replacing, write_text
from rightrank.report.figure import MAX_LABELS, Axis, Figure, LegendEntry, Series, Tone, build_legend, get_colour_name
from rightrank.report.format import make_visible
from rightrank.schema.errors import MissingExtraError, SettingsError

WIDTH, HEIGHT = 460, 310  # of a drawing, in pixels at its natural size
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 30, 46  # margins of a drawing
FONT_SIZE, LETTER_WIDTH, LINE_HEIGHT = (
    12,
    6.6,
    17,
)
FORMATS = ("svg", "pdf", "png")
PNG_SCALE = 3  # pixels of a PNG file for each unit of the drawing
SWATCH_WIDTH = 30  # with the space after it
# Colours of a file. In the page, the variables of the style sheet replace them.
COLOURS = {
    "ink": "#1d2b34", "faint": "#5b6b74", "line": "#d6dde1", "main": "#1c5d7f", "second": "#8a5a00", "accent": "#b5402a",
    "band": "#2a9d90", "s0": "#3b528b", "s1": "#c2571a", "s2": "#21756b", "s3": "#8e3b8a", "s4": "#7a6a00", "s5": "#b3344f",
    "s6": "#2f6fb0", "s7": "#5c7f1e", "s8": "#6a4c93", "s9": "#444444",
}  # fmt: skip


def render_inline_svg(figure: Figure) -> str:
    """Render the drawing for the page, in the page's colours. It is hidden from screen readers, which read the page's text alternative."""
    axes = json.dumps(
        [_build_scale(figure, "x").to_list(figure.x.label), _build_scale(figure, "y").to_list(figure.y.label)]
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" data-figure="{_escape_text(figure.name)}" data-axes="{_escape_text(axes)}" aria-hidden="true" '
        f'focusable="false">{_draw_plot(figure)}</svg>'
    )


def render_svg_file(figure: Figure) -> str:
    """Render the figure as a file: title, drawing and legend on white. Equal figures give equal text."""
    title = wrap(make_visible(figure.title), int((WIDTH - 20) / (1.1 * LETTER_WIDTH)))
    top = 10 + LINE_HEIGHT * len(title)
    legend = _draw_legend(figure, top + HEIGHT + 4)
    total_height = top + HEIGHT + LINE_HEIGHT * len(legend) + 8
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total_height:g}" font-family="system-ui, sans-serif" '
        f'font-size="{FONT_SIZE}">',
        f"<title>{_escape_text(figure.alt)}</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        *(
            f'<text x="12" y="{LINE_HEIGHT * (1 + row)}" font-size="{FONT_SIZE + 2}" fill="var(--ink)">{_escape_text(line)}</text>'
            for row, line in enumerate(title)
        ),
        f'<g transform="translate(0 {top})">{_draw_plot(figure)}</g>',
        *legend,
        "</svg>",
    ]
    return re.sub(r"var\(--(\w+)\)", lambda variable: COLOURS[variable[1]], "\n".join(lines)) + "\n"


@dataclass(frozen=True, slots=True)
class _Scale:
    """A mapping from values to positions along one axis of the drawing."""

    log: bool
    low: float  # the values at both ends
    high: float
    start: float  # the positions of both ends
    end: float

    def __call__(self, value: float) -> float:
        low, at, high = (log10(v) if self.log else v for v in (self.low, value, self.high))
        return round(self.start + (self.end - self.start) * (at - low) / (high - low), 1)

    def to_list(self, label: str) -> list[float | bool | str]:
        """Return the scale and the axis label in the form that the page's script reads."""
        return [self.log, self.low, self.high, self.start, self.end, make_visible(label)]


def _build_scale(figure: Figure, dimension: str) -> _Scale:
    axis: Axis = figure.x if dimension == "x" else figure.y
    positions = (LEFT, WIDTH - RIGHT) if dimension == "x" else (HEIGHT - BOTTOM, TOP)
    is_log = axis.scale != "linear"
    if axis.limits is not None:
        return _Scale(is_log, *axis.limits, *positions)
    values = [*axis.ticks, *_collect_values(figure, dimension)]
    low, high = min(values), max(values)
    room = 0.06 * (high - low or abs(high) or 1.0)  # keeps some space around the smallest and the largest value
    return (
        _Scale(True, low / 1.25, high * 1.25, *positions)
        if is_log
        else _Scale(False, low - room, high + room, *positions)
    )


def _collect_values(figure: Figure, dimension: str) -> list[float]:
    """Return all values that must be visible along the axis."""
    if dimension == "x":
        return [*(x for s in figure.series for x in s.x), *(mark.x for mark in figure.marks)]
    values = [y for s in figure.series for y in (*s.y, *s.low, *s.high)]
    values += [level.value for level in figure.levels] + [mark.y for mark in figure.marks]
    return values + [end for band in figure.bands for end in (band.low, band.high)]


def _compute_ticks(axis: Axis, scale: _Scale) -> list[tuple[float, str]]:
    """Return `(value, text)` for each tick: the ticks of the axis, or round numbers if it has none."""
    if axis.ticks:
        shown = axis.ticks[:: ceil(len(axis.ticks) / MAX_LABELS)]
        return [(tick, f"{tick:g}") for tick in shown if scale.low <= tick <= scale.high]
    rough = (scale.high - scale.low) / 5
    power = 10.0 ** floor(log10(rough))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda width: abs(width - rough))
    digits = max(0, -floor(log10(step) + 1e-9))
    count = range(ceil(scale.low / step - 1e-9), floor(scale.high / step + 1e-9) + 1)
    if step < 1e5:
        return [(n * step, f"{n * step:,.{digits}f}") for n in count]
    largest = max(abs(scale.low), abs(scale.high))
    significant = max(
        6, floor(log10(largest)) - floor(log10(step)) + 1
    )  # Fewer would give several ticks the same text.
    return [(n * step, f"{n * step:.{significant}g}") for n in count]


def _draw_plot(figure: Figure) -> str:
    x, y = _build_scale(figure, "x"), _build_scale(figure, "y")
    clip, right = f"clip-{figure.name}", WIDTH - RIGHT
    inside = f'x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{HEIGHT - TOP - BOTTOM}"'
    elements = [f'<clipPath id="{_escape_text(clip)}"><rect {inside}/></clipPath>', *_draw_axes(figure, x, y)]
    elements.append(f'<g clip-path="url(#{_escape_text(clip)})">')
    for band in figure.bands:
        attributes = (
            f'x="{LEFT}" y="{y(band.high)}" width="{right - LEFT}" height="{round(y(band.low) - y(band.high), 1)}"'
        )
        element = f'<rect {attributes} fill="var(--band)" opacity=".25"/>'
        elements.append(f'<g class="band" data-label="{_escape_text(band.label)}">{element}</g>')
    for level in figure.levels:
        path = f'<path d="M{LEFT} 0H{right}" transform="translate(0 {y(level.value)})" stroke="var(--faint)"'
        element = f'{path} stroke-width="1.4" stroke-dasharray="2 3"/>'
        elements.append(f'<g class="level" data-label="{_escape_text(level.label)}">{element}</g>')
    elements.append("</g>")
    for number, mark in enumerate(
        figure.marks
    ):  # Marks are drawn below the points and around each other, so that all are visible.
        num_inner = sum((mark.x, mark.y) == (earlier_mark.x, earlier_mark.y) for earlier_mark in figure.marks[:number])
        attributes = f'r="{10 + 4 * num_inner}" transform="translate({x(mark.x)} {y(mark.y)})"'
        element = f'<circle {attributes} fill="none" stroke="{_format_colour(mark.tone)}" stroke-width="2.4"/>'
        elements.append(f'<g class="ring {mark.tone}" data-label="{_escape_text(mark.label)}">{element}</g>')
    series = "\n".join(_draw_series(series, x, y) for series in figure.series)
    return "\n".join([*elements, f'<g clip-path="url(#{_escape_text(clip)})">{series}</g>'])


def _draw_axes(figure: Figure, x: _Scale, y: _Scale) -> Iterable[str]:
    left_edge, right_edge, bottom = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM
    yield f'<path d="M{left_edge} {TOP}V{bottom}H{right_edge}" fill="none" stroke="var(--faint)"/>'
    for value, text in _compute_ticks(figure.y, y):
        yield f'<path d="M{left_edge - 4} {y(value)}h4" stroke="var(--faint)"/><path d="M{left_edge} {y(value)}H{right_edge}" stroke="var(--line)" opacity=".5"/>'
        yield _draw_label(text, left_edge - 7, y(value) + 4, "end")
    end = -1e9
    for value, text in _compute_ticks(figure.x, x):
        yield f'<path d="M{x(value)} {bottom}v4" stroke="var(--faint)"/>'
        if x(value) - LETTER_WIDTH * len(text) / 2 > end:  # Otherwise it would touch the previous label.
            yield _draw_label(text, x(value), bottom + 18, "middle")
            end = x(value) + LETTER_WIDTH * (len(text) / 2 + 1)
    yield _draw_label(figure.x.label, (left_edge + right_edge) / 2, HEIGHT - 6, "middle", "ink")
    yield _draw_label(figure.y.label, 12, 14, "start", "ink")  # above the numbers, so that it does not cover them


def _draw_label(text: str, x: float, y: float, anchor: str, colour: str = "faint") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="var(--{colour})">{_escape_text(text)}</text>'


def _draw_series(series: Series, x: _Scale, y: _Scale) -> str:
    points = [(x(a), y(b)) for a, b in zip(series.x, series.y, strict=True)]
    elements = []
    for value, low, high in zip(series.x, map(y, series.low), map(y, series.high), strict=False):
        caps = f"M{x(value)} {low}V{high}M{x(value) - 4:.1f} {low}h8M{x(value) - 4:.1f} {high}h8"
        elements.append(f'<path d="{caps}" fill="none" stroke="currentColor" stroke-width="1.3" opacity=".6"/>')
    between = "H{0}V{1}" if series.kind == "step" else "L{0} {1}"
    path = f"M{points[0][0]} {points[0][1]}" + "".join(between.format(*point) for point in points[1:])
    dashes = ' stroke-dasharray="6 4"' if series.dashed else ""
    elements.append(f'<path d="{path}" fill="none" stroke="currentColor" stroke-width="2"{dashes}/>')
    if series.kind == "both":
        elements += [f'<circle cx="{a}" cy="{b}" r="3.6" fill="currentColor"/>' for a, b in points]
    xs, ys = (" ".join(f"{value:.5g}" for value in values) for values in (series.x, series.y))
    numbers = f'data-x="{xs}" data-y="{ys}"'
    return f'<g class="series" data-label="{_escape_text(series.label)}" {numbers} color="{_format_colour(series.tone)}">{"".join(elements)}</g>'


def _format_colour(tone: Tone) -> str:
    return f"var(--{get_colour_name(tone)})"


def draw_swatch(entry: LegendEntry) -> str:
    """Draw the symbol of a legend entry, 22 units wide and 12 high."""
    line = '<path d="M0 6h22" stroke="currentColor" stroke-width="2"{}/>'
    dot = '<circle cx="11" cy="6" r="3.5" fill="currentColor"/>'
    signs: dict[str, str] = {
        "band": '<rect y="1" width="22" height="10" fill="currentColor" opacity=".35"/>',
        "level": line.format(' stroke-dasharray="2 3"'),
        "ring": '<circle cx="11" cy="6" r="4.7" fill="none" stroke="currentColor" stroke-width="2"/>',
        "both": line.format(' stroke-dasharray="5 3"' if entry.dashed else "") + dot,
    }
    return signs.get(entry.sign) or line.format(' stroke-dasharray="5 3"' if entry.dashed else "")


def _draw_legend(figure: Figure, y: float) -> list[str]:
    """Draw the legend of a file, one group for each line. A line holds as many entries as fit."""
    rows: list[list[str]] = []
    x: float = WIDTH
    for entry in build_legend(figure):
        entry_width = SWATCH_WIDTH + LETTER_WIDTH * 0.9 * len(entry.label) + 14
        if x + entry_width > WIDTH:
            rows.append([])
            x = 12
        attributes = f'transform="translate({x:g} {y + LINE_HEIGHT * len(rows) - LINE_HEIGHT:g})"'
        text = f'<text x="{SWATCH_WIDTH - 2}" y="10" font-size="{FONT_SIZE - 1}" fill="var(--ink)">{_escape_text(entry.label)}</text>'
        rows[-1].append(f'<g {attributes} color="var(--{entry.colour})">{draw_swatch(entry)}{text}</g>')
        x += entry_width
    return ["".join(row) for row in rows]


def _escape_text(value: str) -> str:
    return escape(make_visible(value))


def write_figures(folder: Path, figures: Sequence[Figure], formats: Collection[str] = ()) -> None:
    """Write each figure as `folder/<name>.svg` and `.csv`, and in the requested extra formats. Files are replaced atomically.

    Raises:
        SettingsError: a format is neither pdf nor png.
        MissingExtraError: vl-convert, which converts the SVG, is not installed.
    """
    unknown_format = next((suffix for suffix in formats if suffix not in FORMATS), None)
    if unknown_format is not None:
        raise SettingsError(
            f"{unknown_format!r} is not a supported figure format; give pdf, png or both (svg is always written)"
        )
    for figure in figures:
        drawing = render_svg_file(figure)
        for suffix in ("svg", *formats):
            content = drawing.encode() if suffix == "svg" else _convert_svg(drawing, suffix)
            with replacing(folder / f"{figure.name}.{suffix}") as temporary:
                temporary.write_bytes(content)
        numbers = StringIO()
        csv.writer(numbers, lineterminator="\n").writerows([figure.columns, *figure.rows])
        write_text(folder / f"{figure.name}.csv", numbers.getvalue())


def _convert_svg(drawing: str, suffix: str) -> bytes:
    try:
        import vl_convert
    except ModuleNotFoundError:
        raise MissingExtraError(
            f"writing a figure as .{suffix} needs vl-convert; install it with: pip install 'rightrank[figures]'"
        ) from None
    converted: bytes = (
        vl_convert.svg_to_pdf(drawing) if suffix == "pdf" else vl_convert.svg_to_png(drawing, scale=PNG_SCALE)
    )
    return converted
