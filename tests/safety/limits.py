"""Limits on the processor time and the memory of a block of code."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 5.0  # of the processor, so that a busy machine fails no test
MEMORY_BYTES = 2**30  # beyond what the process has when the block begins


class OutOfTimeError(BaseException):
    """Passes every `except Exception` on its way up."""


@contextmanager
def limited() -> Iterator[None]:
    """Raise `OutOfTimeError` or `MemoryError` in a block that exceeds a limit."""
    address_space = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGPROF, _raise)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, address_space[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, address_space)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)


def _raise(_signal: int, _frame: Any) -> None:
    raise OutOfTimeError
