"""Figures as PNG, SVG and CSV files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rightrank.errors import SettingsError
from rightrank.io.files import replacing, write_text
from rightrank.report.draw import draw
from rightrank.report.figure import AnyFigure, to_csv

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
