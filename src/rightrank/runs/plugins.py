"""The door for plug-ins: what each adds to the core, which imports none of them.

A plug-in is an instance of `Plugin`: the `PLUGIN` of a folder of `rightrank.plugins`, or what another distribution names in the
entry point group `rightrank.plugins`. One that can't be imported costs one notice and what it adds.
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
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, TypeVar

from rightrank.schema.errors import LIBRARY_ERRORS, one_line

if TYPE_CHECKING:
    import click

GROUP = "rightrank.plugins"
FAULTS = (ImportError, SyntaxError, NameError, *LIBRARY_ERRORS)

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """What a plug-in adds; a field that is left out adds nothing.

    Its functions import what they need, so that a plug-in costs nothing until it is used. For example::

        PLUGIN = Plugin(name="chat", functions={"chat": chat}, hooks=lambda: [PostToChat()])
    """

    name: str
    commands: Sequence[click.Command] = ()
    """Commands of `rightrank`."""
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Functions of the Python API by name: `rightrank.NAME`."""
    hooks: Callable[[], Sequence[Any]] = tuple
    """New hooks for one selection; see `rightrank.hooks.Hook`."""
    executors: Mapping[str, Callable[..., AbstractContextManager[Any]]] = field(default_factory=dict)
    """By a value of the setting `executor`: a function of the prepared selection, its folder, and the listener.

    It gives a context, within which workers run, whose value is a `rightrank.runs.executor.Executor`.
    """
    memory_plan: Callable[..., MemoryPlan | None] = lambda *selection: None
    """The memory of a selection's ranks, and those that fit; None where this plug-in can't tell.

    From the base (`LoadedModel`), the data (`EncodedData`), the classes of a classification (None for others), the `SelectSettings`, and
    what receives each line for a person. Ranks that the user did not give may be chosen here. It raises SettingsError where fewer ranks fit than a comparison needs.
    """


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What each rank of a selection needs, and the ranks that fit."""

    peak_bytes: Mapping[int, int]  # allocated by tensors at the peak, by rank
    needed_bytes: Mapping[int, int]  # with what the process and the allocator hold besides
    memory_bytes: int | None  # what there is; None: unknown, and every rank is kept
    ranks: tuple[int, ...]  # those that fit, or all
    max_adapters_per_pass: int | None  # of the highest rank, that fit; None: unknown, or one alone is asked for
    # Bytes of tensors at the peak of these in one pass; None: not planned.
    peak_of: Callable[[Sequence[int]], int | None]


def listed(question: Callable[[Plugin], Sequence[Found]]) -> list[Found]:
    """What all plug-ins answer, in one list."""
    return [part for answer in _asked(question) for part in answer]


def merged(question: Callable[[Plugin], Mapping[str, Found]]) -> dict[str, Found]:
    """What all plug-ins answer, by name."""
    return {name: part for answer in _asked(question) for name, part in answer.items()}


def first(question: Callable[[Plugin], Found | None]) -> Found | None:
    """The answer of the first plug-in that has one."""
    return next((answer for answer in map(question, _loaded().values()) if answer is not None), None)


def _asked(question: Callable[[Plugin], Found]) -> Iterator[Found]:
    """The answer of each plug-in; one that can't import what it adds is left out from then on."""
    for name, plugin in list(_loaded().items()):
        try:
            answer = question(plugin)
        except FAULTS as error:
            _loaded().pop(name)
            _left_out(name, error)
        else:
            yield answer


@cache
def _loaded() -> dict[str, Plugin]:
    """All that could be imported: those of this package, then those of other distributions."""
    loaded: dict[str, Plugin] = {}
    loaders: list[tuple[str, Callable[[], Plugin]]] = []
    # The folders here, whatever the installed metadata says: a source tree may be newer.
    with suppress(ModuleNotFoundError):
        names = [module.name for module in iter_modules(import_module(GROUP).__path__)]
        loaders = [(name, partial(_of_folder, name)) for name in names]
    for name, load in [*loaders, *_of_others()]:
        try:
            loaded.setdefault(name, load())
        except FAULTS as error:
            _left_out(name, error)
    return loaded


def _of_folder(name: str) -> Plugin:
    plugin: Plugin = import_module(f"{GROUP}.{name}").PLUGIN
    return plugin


def _left_out(name: str, error: Exception) -> None:
    """One line on stderr, unless the user's logging sends it elsewhere."""
    reason = one_line(f"{type(error).__name__}: {error}")
    logging.getLogger("rightrank").warning(
        f"rightrank: the plug-in {name!r} can't be imported ({reason}) and is left out"
    )


def _of_others() -> Iterator[tuple[str, Callable[[], Plugin]]]:
    """What other distributions name in the group."""
    if not any(map(_names_the_group, sys.path)):
        return
    from importlib.metadata import entry_points  # reads every distribution: not before one is known to be there

    for entry in entry_points(group=GROUP):
        yield entry.name, entry.load


def _names_the_group(folder: str) -> bool:
    """Whether a distribution in this folder of `sys.path`, other than rightrank itself, names the group."""
    with suppress(OSError), os.scandir(folder or ".") as entries:
        for entry in entries:
            if entry.name.endswith("-info") and not entry.name.startswith("rightrank-"):
                with suppress(FileNotFoundError):
                    if GROUP.encode() in Path(entry.path, "entry_points.txt").read_bytes():
                        return True
    return False
