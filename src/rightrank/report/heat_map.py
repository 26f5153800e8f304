"""Layers × modules as plain data, and its drawings: the terminal, SVG and PNG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from rightrank.errors import SettingsError, did_you_mean
from rightrank.io.files import replacing
from rightrank.records.probe import ModuleSpectrum

Figure: TypeAlias = Literal[
    "effective_rank", "stable_rank", "noise_rank", "energy_rank_0.9", "energy_rank_0.99", "norm"
]
FIGURES: tuple[Figure, ...] = get_args(Figure)
IMAGE_FORMATS = ("svg", "png")
TITLES: dict[Figure, str] = {
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "noise_rank": "rank above the noise",
    "energy_rank_0.9": "rank of 90% of the energy",
    "energy_rank_0.99": "rank of 99% of the energy",
    "norm": "norm of the update",
}


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A value for each layer (row) and module (column); None where there is none."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    title: str

    @property
    def bounds(self) -> tuple[float, float]:
        known = [value for row in self.values for value in row if value is not None]
        return (min(known), max(known)) if known else (0.0, 0.0)


def require_figure(name: str, plot: Path | None) -> Figure:
    """The figure of that name; `plot` must end in an image format that can be drawn.

    Raises:
        SettingsError: an unknown name or ending.
    """
    if plot is not None and plot.suffix[1:].lower() not in IMAGE_FORMATS:
        raise SettingsError(f"--plot {plot}: give a file that ends in .svg or .png")
    for figure in FIGURES:
        if figure == name:
            return figure
    hint = did_you_mean(name, FIGURES)
    raise SettingsError(f"--figure {name!r} is not known{hint or '; allowed: ' + ', '.join(FIGURES)}")


def plot_heat_map(modules: Sequence[ModuleSpectrum], figure: Figure, path: Path) -> None:
    """Draw to a file, by its ending.

    Raises:
        SettingsError: the file can't be written.
    """
    image = draw_heat_map(heat_map(modules, figure), path.suffix[1:].lower())
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(image)
    except OSError as error:
        raise SettingsError(f"--plot {path}: can't write there ({error.strerror or error})") from None


def heat_map(modules: Sequence[ModuleSpectrum], figure: Figure = "effective_rank") -> HeatMap:
    """One cell a module; modules outside numbered layers come in a row of their own."""
    cells: dict[tuple[str, str], float | None] = {}
    rows: dict[str, None] = {}
    columns: dict[str, None] = {}
    for module in modules:
        row, column = split_name(module.name)
        rows.setdefault(row)
        columns.setdefault(column)
        cells[row, column] = _value(module, figure)
    ordered = sorted(rows, key=lambda row: (not row.isdigit(), int(row) if row.isdigit() else 0, row))
    return HeatMap(
        tuple(ordered),
        tuple(columns),
        tuple(tuple(cells.get((row, column)) for column in columns) for row in ordered),
        TITLES[figure],
    )


def split_name(name: str) -> tuple[str, str]:
    """`(layer, module)` of a module's name: ("12", "q_proj"); ("-", name) outside layers."""
    match = re.match(r"(?:.*?\.)?(\d+)\.(.+)$", name)
    if match is None:
        return "-", name.rsplit(".", 1)[-1]
    parts = match[2].split(".")
    return match[1], parts[-1] if parts[-1] != "c_proj" else ".".join(parts[-2:])


def _value(module: ModuleSpectrum, figure: Figure) -> float | None:
    if figure == "norm":
        return module.frobenius_norm
    if figure.startswith("energy_rank_"):
        return module.energy_rank[figure.removeprefix("energy_rank_")]
    value: float | None = getattr(module, figure)
    return value


def draw_heat_map(data: HeatMap, image_format: str) -> bytes:
    """The heat map as `svg` or `png` bytes."""
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    grid = np.array([[np.nan if value is None else value for value in row] for row in data.values], dtype=float)
    size = (1.5 + 0.85 * len(data.columns), 1.6 + 0.32 * len(data.rows))
    style: Any = {"svg.hashsalt": "rightrank", "font.size": 9}
    with rc_context(style):
        figure = Canvas(figsize=size, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(grid, aspect="auto", cmap="cividis")
        axes.set_xticks(range(len(data.columns)), data.columns, rotation=35, ha="right")
        axes.set_yticks(range(len(data.rows)), data.rows)
        axes.set_ylabel("layer")
        axes.set_title(data.title)
        middle = sum(data.bounds) / 2
        if grid.size <= 400:
            for (row, column), value in np.ndenumerate(grid):
                if np.isfinite(value):
                    colour = "white" if value < middle else "black"
                    axes.text(column, row, short(float(value)), ha="center", va="center", fontsize=7, color=colour)
        figure.colorbar(image, ax=axes)
        buffer = BytesIO()
        figure.savefig(buffer, format=image_format, metadata={"Date": None} if image_format == "svg" else None, dpi=150)
    return buffer.getvalue()


def short(value: float) -> str:
    """At most five characters."""
    return f"{value:.0f}" if value >= 100 or float(value).is_integer() else f"{value:.2g}"
