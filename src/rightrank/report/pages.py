"""The templates of the pages and of the model card, with the filters that show values from data as text."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rightrank.report.format import make_visible

MAX_NUMBER_ROWS = 200  # in the report; the figure's CSV file has all rows


@cache
def load_templates(autoescape: bool = True) -> Environment:
    """Load the template environment. With `autoescape`, values are escaped and control characters made visible."""
    environment = Environment(
        loader=PackageLoader("rightrank.report", "templates"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: make_visible(value) if autoescape and type(value) is str else value,
    )
    environment.globals |= {"max_numbers": MAX_NUMBER_ROWS, "style": read_asset("report.css")}
    environment.filters["cell"] = _format_cell
    return environment


def _format_cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


@cache
def read_asset(name: str) -> str:
    """Read a file from the templates folder."""
    return files("rightrank.report").joinpath("templates", name).read_text(encoding="utf-8").strip("\n")
