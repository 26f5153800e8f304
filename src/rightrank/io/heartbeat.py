"""Sign of life of a worker: a small file that it writes as it works, and the watch that a driver keeps on it.

The worker beats from the work itself (a step done, items evaluated), never from a thread of its own: a thread goes
on beating while the work hangs. The driver looks for a change and takes the time on its own monotonic clock, so
clocks that differ between machines, or are set back, change nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rightrank.io.files import write_text

BEAT_SECONDS = 1.0  # between writes of the file, however often the worker beats
PATIENCE = 20.0  # times the longest silence so far that a worker may be silent before it is called hung


class Heartbeat:
    """The worker's side."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._written: float | None = None
        self._count = 0

    def beat(self, doing: str) -> None:
        """Say that the work goes on; `doing` is for a person, such as `r=8 step 40 of 200`.

        A full or lost disk is not the heartbeat's to tell: the beat is then skipped, and the work itself will say so.
        """
        if self._written is not None and self._clock() - self._written < BEAT_SECONDS:
            return
        self._written = self._clock()
        self._count += 1
        with suppress(OSError):
            write_text(self._path, f"{os.getpid()} {self._count} {doing}\n", flush=False)


class HeartbeatWatch:
    """The driver's side: how long a worker has been silent, and whether that is too long."""

    def __init__(self, path: Path, least_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """A worker is never called hung before `least_seconds` of silence."""
        self._path = path
        self._least_seconds = least_seconds
        self._clock = clock
        self._seen = self._read()
        self._changed = clock()
        self._longest = 0.0

    def silent_seconds(self) -> float:
        """Since the last change that was seen; look at least every few seconds."""
        now, text = self._clock(), self._read()
        if text != self._seen:
            self._longest = max(self._longest, now - self._changed)
            self._seen, self._changed = text, now
        return now - self._changed

    def is_hung(self) -> bool:
        """Silent for far longer than it ever was at work."""
        return self.silent_seconds() > self.limit_seconds

    @property
    def limit_seconds(self) -> float:
        """`least_seconds`, or `PATIENCE` times the longest silence so far: one slow evaluation is no hang."""
        return max(self._least_seconds, PATIENCE * self._longest)

    def last_words(self) -> str:
        """What the worker was doing when it was last heard; empty before its first beat."""
        return self._seen.split(" ", 2)[2].strip() if self._seen.count(" ") >= 2 else ""

    def _read(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8")
        except OSError:  # not there yet, or between two names on a network file system
            return ""
