"""The interface of plug-ins, which extend the core. The core imports none of them.

A plug-in is an instance of `Plugin`: the `PLUGIN` of the packages in `BUNDLED`, or an object that another distribution
names in the entry point group `rightrank.plugins`. If a plug-in can't be imported, a warning names it and it is left out.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rightrank.schema.errors import format_one_line, log_traceback

if TYPE_CHECKING:
    import click

GROUP = "rightrank.plugins"
BUNDLED = ("atlas", "cluster", "planning")
# The errors of a plug-in that is damaged, was written for another version, or whose packages or compiled libraries are missing or do not
# fit. Any other error has its own traceback.
IMPORT_FAULTS = (ImportError, OSError, RuntimeError, SyntaxError, NameError, AttributeError, TypeError, ValueError)

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """The extensions of a plug-in. A field that is left out adds nothing.

    Its functions import their dependencies when they are called, so that a plug-in costs nothing until it is used. For example::

        PLUGIN = Plugin(name="chat", functions={"chat": chat}, hooks=lambda: [PostToChat()])
    """

    name: str
    commands: Sequence[click.Command] = ()
    """Commands of `rightrank`."""
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Functions of the Python API by name: `rightrank.NAME`."""
    hooks: Callable[[], Sequence[Any]] = tuple
    """New hooks for one selection; see `rightrank.runs.hook.Hook`."""
    executors: Mapping[str, Callable[..., AbstractContextManager[Any]]] = field(default_factory=dict)
    """By value of the setting `executor`: a function that takes the prepared selection, its folder, and the listener.

    It returns a context manager, within which workers run, whose value is a `rightrank.runs.selection.Executor`.
    """
    memory_plan: Callable[..., MemoryPlan | None] = lambda *selection: None
    """A function that plans the memory of a selection's ranks and returns those that fit, or None if it can't.

    It takes the base (`LoadedModel`), the data (`EncodedData`), the classes of a classification (otherwise None), the
    `SelectSettings`, and a function that receives each line for a person. It may choose ranks that the user did not give. It
    raises SettingsError if fewer ranks fit than a comparison needs.
    """


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory that each rank of a selection needs, and the ranks that fit."""

    peak_bytes: Mapping[int, int]  # by rank: peak memory of tensors
    needed_bytes: Mapping[int, int]  # by rank: peak memory including that of the process and the allocator
    memory_bytes: int | None  # available memory; None: unknown, and all ranks are tried
    ranks: tuple[int, ...]  # the ranks that fit, or all
    max_adapters_per_pass: (
        int | None
    )  # adapters of the highest rank that fit; None: unknown, or the settings ask for one
    # Returns the peak memory of tensors, in bytes, of training these ranks in one pass; None: not planned.
    predict_peak_bytes: Callable[[Sequence[int]], int | None]


def collect_items(query: Callable[[Plugin], Sequence[Value]]) -> list[Value]:
    """Return the items of all plug-ins in one list."""
    return [item for answer in _query_plugins(query) for item in answer]


def collect_mapping(query: Callable[[Plugin], Mapping[str, Value]]) -> dict[str, Value]:
    """Return the items of all plug-ins by name."""
    return {name: item for answer in _query_plugins(query) for name, item in answer.items()}


def find_first(query: Callable[[Plugin], Value | None]) -> Value | None:
    """Return the result of the first plug-in that has one."""
    return next((answer for answer in map(query, _load_plugins().values()) if answer is not None), None)


def _query_plugins(query: Callable[[Plugin], Value]) -> Iterator[Value]:
    """Yield the result of each plug-in. One whose extension can't be imported is left out from then on."""
    for name, plugin in list(_load_plugins().items()):
        try:
            answer = query(plugin)
        except IMPORT_FAULTS as error:
            _load_plugins().pop(name)
            _warn_import_error(name, error)
        else:
            yield answer


@cache
def _load_plugins() -> dict[str, Plugin]:
    """Import all plug-ins: those of this package, then those of other distributions."""
    loaded: dict[str, Plugin] = {}
    loaders: list[tuple[str, Callable[[], Plugin]]] = [(name, partial(_load_bundled, name)) for name in BUNDLED]
    for name, load in [*loaders, *_find_installed()]:
        try:
            loaded.setdefault(name, load())
        except IMPORT_FAULTS as error:
            _warn_import_error(name, error)
    return loaded


def _load_bundled(name: str) -> Plugin:
    plugin: Plugin = import_module(f"rightrank.{name}").PLUGIN
    return plugin


def _warn_import_error(name: str, error: Exception) -> None:
    """Print one line on stderr, unless the user's logging sends it elsewhere."""
    reason = format_one_line(f"{type(error).__name__}: {error}")
    logging.getLogger("rightrank").warning(
        f"rightrank: the plug-in {name!r} can't be imported ({reason}) and is left out"
    )
    log_traceback(error)


def _find_installed() -> Iterator[tuple[str, Callable[[], Plugin]]]:
    """Yield the plug-ins that other distributions name in the entry point group."""
    if not any(map(_has_entry_point, sys.path)):
        return
    from importlib.metadata import entry_points  # slow: it reads every distribution

    for entry in entry_points(group=GROUP):
        yield entry.name, entry.load


def _has_entry_point(folder: str) -> bool:
    """Check whether a distribution in this folder of `sys.path`, other than rightrank itself, names the entry point group."""
    with suppress(OSError), os.scandir(folder or ".") as entries:
        for entry in entries:
            if entry.name.endswith("-info") and not entry.name.startswith("rightrank-"):
                with suppress(FileNotFoundError):
                    if GROUP.encode() in Path(entry.path, "entry_points.txt").read_bytes():
                        return True
    return False
