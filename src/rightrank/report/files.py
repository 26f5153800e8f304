"""Every figure of the report as a PNG, an SVG and a CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rightrank.io.files import replacing, write_text
from rightrank.report.draw import draw
from rightrank.report.figure import AnyFigure, to_csv

IMAGE_FORMATS = ("svg", "png")


def write_figures(folder: Path, figures: Sequence[AnyFigure]) -> None:
    """`folder/<name>.svg`, `.png` and `.csv` of each figure, each file replaced whole."""
    for figure in figures:
        for image_format in IMAGE_FORMATS:
            with replacing(folder / f"{figure.name}.{image_format}") as path:
                path.write_bytes(draw(figure, image_format))
        write_text(folder / f"{figure.name}.csv", to_csv(figure))
