"""What a selection is doing at this moment, told from its process to the one that will kill it.

The child's functions are wrapped where they are named; each tells a page of memory that both processes share, which
outlives a SIGKILL.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

PHASES = ("training", "evaluation", "journal", "checkpoint", "views")
ELSEWHERE = "elsewhere"  # loading, deciding, between two of the others
_RECORD = struct.Struct("<qd")  # entries, seconds


class Moments:
    """The shared page, and a pipe that reports the entry of a phase."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, 4096)
        self._read, self._write = os.pipe()
        self._asked: tuple[str | None, int] = (None, 0)

    def ask(self, phase: str | None, entry: int) -> None:
        """Before a start: forget the last run, and say which entry to tell."""
        self._page[:] = bytes(4096)
        self._asked = (phase, entry)
        while select.select([self._read], [], [], 0)[0]:
            os.read(self._read, 64)

    def wait(self, child: int, seconds: float) -> bool:
        """Until the asked entry or the child's end, at most so long; whether the entry came."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if select.select([self._read], [], [], 0.1)[0]:
                return True
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return False
        return False

    def phase(self) -> str:
        current = self._page[0]
        return ELSEWHERE if current == 0 else PHASES[current - 1]

    def usual(self) -> dict[str, tuple[int, float]]:
        """Entries of each phase in the last run, and their mean seconds."""
        found = {}
        for number, name in enumerate(PHASES):
            entries, seconds = self._get(number)
            found[name] = (entries, seconds / max(entries, 1))
        return found

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        number = PHASES.index(name)

        def inner(*arguments: Any, **named: Any) -> Any:
            outer, self._page[0] = self._page[0], number + 1
            entries, seconds = self._get(number)
            self._put(number, entries + 1, seconds)
            if self._asked == (name, entries + 1):
                os.write(self._write, b"!")
            begun = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                entries, seconds = self._get(number)
                self._put(number, entries, seconds + time.perf_counter() - begun)
                self._page[0] = outer

        return inner

    def _get(self, number: int) -> tuple[int, float]:
        entries, seconds = _RECORD.unpack_from(self._page, 64 + number * _RECORD.size)
        return entries, seconds

    def _put(self, number: int, entries: int, seconds: float) -> None:
        _RECORD.pack_into(self._page, 64 + number * _RECORD.size, entries, seconds)


def watch_phases(moments: Moments) -> None:
    """Wrap what a selection calls, in every module that names it."""
    from rightrank.data.files import write_text
    from rightrank.models.adapter_files import save_adapter
    from rightrank.report.html import render_report
    from rightrank.report.svg import write_figures
    from rightrank.runs.finish import hand_over
    from rightrank.runs.journal import Journal
    from rightrank.train.optimizer import save_checkpoint, take_step
    from rightrank.train.runtime import Runtime

    phases: dict[str, list[Callable[..., Any]]] = {
        "training": [take_step],
        "checkpoint": [save_checkpoint],
        "views": [render_report, write_text, write_figures, hand_over, save_adapter],
    }
    for name, functions in phases.items():
        for function in functions:
            _replace_everywhere(function, moments.wrapped(name, function))
    Journal.append = moments.wrapped("journal", Journal.append)  # type: ignore[method-assign]
    evaluated = moments.wrapped("evaluation", Runtime.evaluate_adapters)
    Runtime.evaluate_adapters = evaluated  # type: ignore[method-assign]


def _replace_everywhere(function: Callable[..., Any], by: Callable[..., Any]) -> None:
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("rightrank") and getattr(module, function.__name__, None) is function:
            setattr(module, function.__name__, by)
