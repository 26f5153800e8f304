"""Figures as plain data. Pure functions compute them, backends draw them, and tests check their numbers.

The backends are `svg` and the text curve in `terminal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Literal, TypeAlias

from rightrank.report.format import make_visible

Scale: TypeAlias = Literal["linear", "log2", "log10"]
Kind: TypeAlias = Literal["line", "both", "step"]
Tone: TypeAlias = Literal["main", "second", "accent", "faint"] | int  # an integer: position in a sequence of colours
Number: TypeAlias = float | int
Cell: TypeAlias = str | float | int | None
MAX_LABELS = 12  # ticks of an axis and series of a legend


@dataclass(frozen=True, slots=True)
class Axis:
    label: str
    scale: Scale = "linear"
    ticks: tuple[Number, ...] = ()  # empty: the backend chooses
    limits: tuple[float, float] | None = None  # None: all values, with a small margin


def format_metric_label(metric: str, higher_is_better: bool | None) -> str:
    """Return the label of an axis with held-out values, with the better direction if it is available."""
    label = "held-out loss, nats" if metric == "loss" else f"held-out {make_visible(metric)}"
    better = "" if higher_is_better is None else f" ({'higher' if higher_is_better else 'lower'} is better)"
    return label + better


def build_metric_axis(metric: str, higher_is_better: bool | None, limits: tuple[float, float]) -> Axis:
    return Axis(format_metric_label(metric, higher_is_better), limits=limits)


def build_rank_axis(ranks: Sequence[int]) -> Axis:
    return Axis("LoRA rank", "log2", tuple(sorted(set(ranks))))


def build_zero_based_axis(label: str, values: Sequence[float]) -> Axis:
    """Return an axis that starts at zero, for quantities whose ratio matters, such as memory and time."""
    return Axis(label, limits=(0.0, 1.08 * max(values, default=1.0) or 1.0))


def compute_log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return the powers of ten within the limits; if there are fewer than three, also their multiples by 2 and 5."""
    exponents = range(floor(log10(low)), ceil(log10(high)) + 1)
    ticks: list[tuple[float, ...]] = [
        tuple(tick for power in exponents for factor in factors if low <= (tick := float(f"{factor}e{power}")) <= high)
        for factors in ((1,), (1, 2, 5))
    ]
    return ticks[0] if len(ticks[0]) >= 3 else ticks[1]


@dataclass(frozen=True, slots=True)
class Series:
    """Points in the order of x; `low` and `high` are the ends of intervals, empty without intervals.

    Series with the same label share one legend entry.
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
    """A horizontal band."""

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
    """A plot of series over two axes.

    `name` is its file name, `alt` its text alternative, and `rows` are its numbers under the headings `columns`.
    """

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
class LegendEntry:
    """An entry of the legend: all series with the same label, a band, a level or a mark."""

    label: str
    sign: str  # the kind of a series, or "band", "level", "ring"
    colour: str  # its name in the style sheet
    dashed: bool = False


def build_legend(figure: Figure) -> list[LegendEntry]:
    """Return the legend's entries. A single series without intervals needs no legend, because the title describes it."""
    series = {s.label: LegendEntry(s.label, s.kind, get_colour_name(s.tone), s.dashed) for s in reversed(figure.series)}
    entries = list(reversed(series.values()))[:MAX_LABELS]
    entries += [LegendEntry(mark.label, "ring", get_colour_name(mark.tone)) for mark in figure.marks]
    entries += [LegendEntry(band.label, "band", "band") for band in figure.bands]
    entries += [LegendEntry(level.label, "level", "faint") for level in figure.levels if level.label]
    return entries if len(entries) > 1 or any(s.high for s in figure.series) else []


def get_colour_name(tone: Tone) -> str:
    """Return the name of a tone's colour in the style sheet."""
    return f"s{tone % 10}" if isinstance(tone, int) else tone
