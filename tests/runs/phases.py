"""Report the phase of a running selection to the process that will kill it.

Functions of the child process are wrapped; each writes to a page of memory that both processes share, which survives a
SIGKILL.
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
ELSEWHERE = "elsewhere"  # loading, deciding, and between other phases
_RECORD = struct.Struct("<qd")  # entries, seconds


class PhaseRecorder:
    """A page of shared memory, and a pipe that reports the entry into a phase."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, 4096)
        self._read, self._write = os.pipe()
        self._requested: tuple[str | None, int] = (None, 0)

    def request(self, phase: str | None, entry: int) -> None:
        """Forget the last run and request a report of this entry into this phase."""
        self._page[:] = bytes(4096)
        self._requested = (phase, entry)
        while select.select([self._read], [], [], 0)[0]:
            os.read(self._read, 64)

    def wait(self, child: int, seconds: float) -> bool:
        """Wait for the requested entry or the end of the child, and return whether the entry was reported."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if select.select([self._read], [], [], 0.1)[0]:
                return True
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return False
        return False

    def get_phase(self) -> str:
        current = self._page[0]
        return ELSEWHERE if current == 0 else PHASES[current - 1]

    def measure_phases(self) -> dict[str, tuple[int, float]]:
        """Return the entries of each phase in the last run, and their mean seconds."""
        durations = {}
        for number, name in enumerate(PHASES):
            entries, seconds = self._get(number)
            durations[name] = (entries, seconds / max(entries, 1))
        return durations

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        number = PHASES.index(name)

        def measure_call(*arguments: Any, **keywords: Any) -> Any:
            outer, self._page[0] = self._page[0], number + 1
            entries, seconds = self._get(number)
            self._put(number, entries + 1, seconds)
            if self._requested == (name, entries + 1):
                os.write(self._write, b"!")
            begun = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                entries, seconds = self._get(number)
                self._put(number, entries, seconds + time.perf_counter() - begun)
                self._page[0] = outer

        return measure_call

    def _get(self, number: int) -> tuple[int, float]:
        entries, seconds = _RECORD.unpack_from(self._page, 64 + number * _RECORD.size)
        return entries, seconds

    def _put(self, number: int, entries: int, seconds: float) -> None:
        _RECORD.pack_into(self._page, 64 + number * _RECORD.size, entries, seconds)


def watch_phases(recorder: PhaseRecorder) -> None:
    """Wrap the functions that a selection calls, in every module that imports them."""
    from rightrank.data.files import write_text
    from rightrank.models.adapter_writer import save_adapter
    from rightrank.report.html import render_report
    from rightrank.report.svg import write_figures
    from rightrank.runs.finish import export_adapter
    from rightrank.runs.journal import Journal
    from rightrank.train.optimizer import save_checkpoint, take_step
    from rightrank.train.runtime import Runtime

    phases: dict[str, list[Callable[..., Any]]] = {
        "training": [take_step],
        "checkpoint": [save_checkpoint],
        "views": [render_report, write_text, write_figures, export_adapter, save_adapter],
    }
    for name, functions in phases.items():
        for function in functions:
            _replace_everywhere(function, recorder.wrap(name, function))
    Journal.append = recorder.wrap("journal", Journal.append)  # type: ignore[method-assign]
    evaluated = recorder.wrap("evaluation", Runtime.evaluate_adapters)
    Runtime.evaluate_adapters = evaluated  # type: ignore[method-assign]


def _replace_everywhere(function: Callable[..., Any], by: Callable[..., Any]) -> None:
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("rightrank") and getattr(module, function.__name__, None) is function:
            setattr(module, function.__name__, by)
