"""The Python API: one function for each verb, records in and records out, nothing printed.

The command line is a thin layer over it. A name is imported on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rightrank.api.adapters import compare, inspect, inspect_gradient, resize
    from rightrank.api.deciding import decide
    from rightrank.api.runs import begun_as, export, repair, status, write_report
    from rightrank.api.selecting import preflight, select_rank, select_rank_with

_PLACES = {
    "adapters": ("compare", "inspect", "inspect_gradient", "resize"),
    "deciding": ("decide",),
    "runs": ("begun_as", "export", "repair", "status", "write_report"),
    "selecting": ("preflight", "select_rank", "select_rank_with"),
}

__all__ = [
    "begun_as",
    "compare",
    "decide",
    "export",
    "inspect",
    "inspect_gradient",
    "preflight",
    "repair",
    "resize",
    "select_rank",
    "select_rank_with",
    "status",
    "write_report",
]


def __getattr__(name: str) -> object:
    for place, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"rightrank.api.{place}"), name)
    raise AttributeError(f"module 'rightrank.api' has no attribute {name!r}")
