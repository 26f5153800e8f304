"""Figures as SVG, drawn once: the page shows the drawing, a file adds title, legend and colours to it.

Every series, band, level and mark is a group with its label in `data-label`; a series has its numbers in `data-x` and
`data-y`, and the drawing has its two scales in `data-axes`. The page's script reads nothing else.
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
from rightrank.report.figure import MAX_LABELS, Axis, Figure, Part, Series, Tone, colour_name, parts_of
from rightrank.report.format import visible
from rightrank.schema.errors import MissingExtraError, SettingsError

WIDTH, HEIGHT = 460, 310  # of a drawing in its own units, which are pixels at its natural size
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 30, 46  # its margins
FONT, LETTER, LINE = 12, 6.6, 17  # of texts: the size, the mean width of a letter, the height of a line
FORMATS = ("svg", "pdf", "png")
PIXELS = 3  # of a PNG file for each unit of the drawing
SWATCH = 30  # the width of a legend's sign with the space behind it
# Colours of a file; in the page, the variables of its style sheet take their place.
COLOURS = {
    "ink": "#1d2b34", "faint": "#5b6b74", "line": "#d6dde1", "main": "#1c5d7f", "second": "#8a5a00", "accent": "#b5402a",
    "band": "#2a9d90", "s0": "#3b528b", "s1": "#c2571a", "s2": "#21756b", "s3": "#8e3b8a", "s4": "#7a6a00", "s5": "#b3344f",
    "s6": "#2f6fb0", "s7": "#5c7f1e", "s8": "#6a4c93", "s9": "#444444",
}  # fmt: skip


def inline_svg(figure: Figure) -> str:
    """The drawing for the page, in the page's colours; screen readers read the page's own text in its place."""
    axes = json.dumps([_scale_of(figure, "x").data(figure.x.label), _scale_of(figure, "y").data(figure.y.label)])
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" data-figure="{_text(figure.name)}" data-axes="{_text(axes)}" aria-hidden="true" '
        f'focusable="false">{_plot(figure)}</svg>'
    )


def svg_file(figure: Figure) -> str:
    """The figure as a file: title, drawing and legend on white. The same figure gives the same text."""
    title = wrap(visible(figure.title), int((WIDTH - 20) / (1.1 * LETTER)))
    top = 10 + LINE * len(title)
    legend = _legend(figure, top + HEIGHT + 4)
    whole = top + HEIGHT + LINE * len(legend) + 8
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {whole:g}" font-family="system-ui, sans-serif" '
        f'font-size="{FONT}">',
        f"<title>{_text(figure.alt)}</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        *(
            f'<text x="12" y="{LINE * (1 + row)}" font-size="{FONT + 2}" fill="var(--ink)">{_text(line)}</text>'
            for row, line in enumerate(title)
        ),
        f'<g transform="translate(0 {top})">{_plot(figure)}</g>',
        *legend,
        "</svg>",
    ]
    return re.sub(r"var\(--(\w+)\)", lambda variable: COLOURS[variable[1]], "\n".join(lines)) + "\n"


@dataclass(frozen=True, slots=True)
class _Scale:
    """From a value to its place along one side of the drawing."""

    log: bool
    low: float  # the values at both ends
    high: float
    start: float  # their places
    end: float

    def __call__(self, value: float) -> float:
        low, at, high = (log10(v) if self.log else v for v in (self.low, value, self.high))
        return round(self.start + (self.end - self.start) * (at - low) / (high - low), 1)

    def data(self, label: str) -> list[float | bool | str]:
        """What the page's script computes the same place from, and the axis's name."""
        return [self.log, self.low, self.high, self.start, self.end, visible(label)]


def _scale_of(figure: Figure, which: str) -> _Scale:
    axis: Axis = figure.x if which == "x" else figure.y
    ends = (LEFT, WIDTH - RIGHT) if which == "x" else (HEIGHT - BOTTOM, TOP)
    is_log = axis.scale != "linear"
    if axis.limits is not None:
        return _Scale(is_log, *axis.limits, *ends)
    values = [*axis.ticks, *_values(figure, which)]
    low, high = min(values), max(values)
    room = 0.06 * (high - low or abs(high) or 1.0)  # some room around the least and the largest value
    return _Scale(True, low / 1.25, high * 1.25, *ends) if is_log else _Scale(False, low - room, high + room, *ends)


def _values(figure: Figure, which: str) -> list[float]:
    """All values that must be seen along the axis."""
    if which == "x":
        return [*(x for s in figure.series for x in s.x), *(mark.x for mark in figure.marks)]
    values = [y for s in figure.series for y in (*s.y, *s.low, *s.high)]
    values += [level.value for level in figure.levels] + [mark.y for mark in figure.marks]
    return values + [end for band in figure.bands for end in (band.low, band.high)]


def _ticks(axis: Axis, scale: _Scale) -> list[tuple[float, str]]:
    """The places and the texts of the ticks: those of the axis, or some round numbers."""
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
    significant = max(6, floor(log10(largest)) - floor(log10(step)) + 1)  # fewer would give several ticks one text
    return [(n * step, f"{n * step:.{significant}g}") for n in count]


def _plot(figure: Figure) -> str:
    x, y = _scale_of(figure, "x"), _scale_of(figure, "y")
    clip, right = f"clip-{figure.name}", WIDTH - RIGHT
    inside = f'x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{HEIGHT - TOP - BOTTOM}"'
    parts = [f'<clipPath id="{_text(clip)}"><rect {inside}/></clipPath>', *_axes(figure, x, y)]
    parts.append(f'<g clip-path="url(#{_text(clip)})">')
    for band in figure.bands:
        place = f'x="{LEFT}" y="{y(band.high)}" width="{right - LEFT}" height="{round(y(band.low) - y(band.high), 1)}"'
        drawn = f'<rect {place} fill="var(--band)" opacity=".25"/>'
        parts.append(f'<g class="band" data-label="{_text(band.label)}">{drawn}</g>')
    for level in figure.levels:
        path = f'<path d="M{LEFT} 0H{right}" transform="translate(0 {y(level.value)})" stroke="var(--faint)"'
        drawn = f'{path} stroke-width="1.4" stroke-dasharray="2 3"/>'
        parts.append(f'<g class="level" data-label="{_text(level.label)}">{drawn}</g>')
    parts.append("</g>")
    for number, mark in enumerate(figure.marks):  # below the points, and around each other, so that none is hidden
        inner = sum((mark.x, mark.y) == (other.x, other.y) for other in figure.marks[:number])
        place = f'r="{10 + 4 * inner}" transform="translate({x(mark.x)} {y(mark.y)})"'
        drawn = f'<circle {place} fill="none" stroke="{_colour(mark.tone)}" stroke-width="2.4"/>'
        parts.append(f'<g class="ring {mark.tone}" data-label="{_text(mark.label)}">{drawn}</g>')
    series = "\n".join(_series(series, x, y) for series in figure.series)
    return "\n".join([*parts, f'<g clip-path="url(#{_text(clip)})">{series}</g>'])


def _axes(figure: Figure, x: _Scale, y: _Scale) -> Iterable[str]:
    left, right, bottom = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM
    yield f'<path d="M{left} {TOP}V{bottom}H{right}" fill="none" stroke="var(--faint)"/>'
    for value, text in _ticks(figure.y, y):
        yield f'<path d="M{left - 4} {y(value)}h4" stroke="var(--faint)"/><path d="M{left} {y(value)}H{right}" stroke="var(--line)" opacity=".5"/>'
        yield _label(text, left - 7, y(value) + 4, "end")
    end = -1e9
    for value, text in _ticks(figure.x, x):
        yield f'<path d="M{x(value)} {bottom}v4" stroke="var(--faint)"/>'
        if x(value) - LETTER * len(text) / 2 > end:  # else it would touch the text before it
            yield _label(text, x(value), bottom + 18, "middle")
            end = x(value) + LETTER * (len(text) / 2 + 1)
    yield _label(figure.x.label, (left + right) / 2, HEIGHT - 6, "middle", "ink")
    yield _label(figure.y.label, 12, 14, "start", "ink")  # above the numbers, which it would cover beside them


def _label(text: str, x: float, y: float, anchor: str, colour: str = "faint") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="var(--{colour})">{_text(text)}</text>'


def _series(series: Series, x: _Scale, y: _Scale) -> str:
    places = [(x(a), y(b)) for a, b in zip(series.x, series.y, strict=True)]
    parts = []
    for value, low, high in zip(series.x, map(y, series.low), map(y, series.high), strict=False):
        caps = f"M{x(value)} {low}V{high}M{x(value) - 4:.1f} {low}h8M{x(value) - 4:.1f} {high}h8"
        parts.append(f'<path d="{caps}" fill="none" stroke="currentColor" stroke-width="1.3" opacity=".6"/>')
    between = "H{0}V{1}" if series.kind == "step" else "L{0} {1}"
    path = f"M{places[0][0]} {places[0][1]}" + "".join(between.format(*place) for place in places[1:])
    dashes = ' stroke-dasharray="6 4"' if series.dashed else ""
    parts.append(f'<path d="{path}" fill="none" stroke="currentColor" stroke-width="2"{dashes}/>')
    if series.kind == "both":
        parts += [f'<circle cx="{a}" cy="{b}" r="3.6" fill="currentColor"/>' for a, b in places]
    xs, ys = (" ".join(f"{value:.5g}" for value in values) for values in (series.x, series.y))
    numbers = f'data-x="{xs}" data-y="{ys}"'
    return f'<g class="series" data-label="{_text(series.label)}" {numbers} color="{_colour(series.tone)}">{"".join(parts)}</g>'


def _colour(tone: Tone) -> str:
    return f"var(--{colour_name(tone)})"


def swatch(part: Part) -> str:
    """The sign of a part of the figure in the legend: 22 units wide, 12 high."""
    line = '<path d="M0 6h22" stroke="currentColor" stroke-width="2"{}/>'
    dot = '<circle cx="11" cy="6" r="3.5" fill="currentColor"/>'
    signs: dict[str, str] = {
        "band": '<rect y="1" width="22" height="10" fill="currentColor" opacity=".35"/>',
        "level": line.format(' stroke-dasharray="2 3"'),
        "ring": '<circle cx="11" cy="6" r="4.7" fill="none" stroke="currentColor" stroke-width="2"/>',
        "both": line.format(' stroke-dasharray="5 3"' if part.dashed else "") + dot,
    }
    return signs.get(part.sign) or line.format(' stroke-dasharray="5 3"' if part.dashed else "")


def _legend(figure: Figure, y: float) -> list[str]:
    """The legend of a file: one group for each line; a line holds as many entries as fit."""
    rows: list[list[str]] = []
    x: float = WIDTH
    for part in parts_of(figure):
        needed = SWATCH + LETTER * 0.9 * len(part.label) + 14
        if x + needed > WIDTH:
            rows.append([])
            x = 12
        place = f'transform="translate({x:g} {y + LINE * len(rows) - LINE:g})"'
        text = f'<text x="{SWATCH - 2}" y="10" font-size="{FONT - 1}" fill="var(--ink)">{_text(part.label)}</text>'
        rows[-1].append(f'<g {place} color="var(--{part.colour})">{swatch(part)}{text}</g>')
        x += needed
    return ["".join(row) for row in rows]


def _text(value: str) -> str:
    return escape(visible(value))


def write_figures(folder: Path, figures: Sequence[Figure], formats: Collection[str] = ()) -> None:
    """`folder/<name>.svg`, `.csv` and further formats (pdf, png) of each figure. Each file is replaced as a whole.

    Raises:
        SettingsError: another format.
        MissingExtraError: vl-convert, which makes them, is not installed.
    """
    unknown = next((ending for ending in formats if ending not in FORMATS), None)
    if unknown is not None:
        raise SettingsError(f"{unknown!r}: figures are written as .svg, .pdf or .png; give pdf, png or both")
    for figure in figures:
        drawing = svg_file(figure)
        for ending in ("svg", *formats):
            made = drawing.encode() if ending == "svg" else _converted(drawing, ending)
            with replacing(folder / f"{figure.name}.{ending}") as temporary:
                temporary.write_bytes(made)
        numbers = StringIO()
        csv.writer(numbers, lineterminator="\n").writerows([figure.columns, *figure.rows])
        write_text(folder / f"{figure.name}.csv", numbers.getvalue())


def _converted(drawing: str, ending: str) -> bytes:
    try:
        import vl_convert
    except ModuleNotFoundError:
        raise MissingExtraError(
            f"a figure as .{ending} needs vl-convert; install it with: pip install 'rightrank[figures]'"
        ) from None
    made: bytes = vl_convert.svg_to_pdf(drawing) if ending == "pdf" else vl_convert.svg_to_png(drawing, scale=PIXELS)
    return made
