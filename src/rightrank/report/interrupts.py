"""Ctrl-C in a script or a notebook: the current step ends, checkpoints are written, and `KeyboardInterrupt` is raised."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

from rightrank.errors import InterruptedRun
from rightrank.records.observer import Observer


@contextmanager
def checkpointed(observer: Observer) -> Iterator[Observer]:
    """The observer, which stops the run after the step in which Ctrl-C is pressed; a second Ctrl-C interrupts at once.

    Outside the main thread, or where the program handles the signal itself, nothing changes.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed and the checkpoints are written.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield observer
        return
    requested = threading.Event()

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            signal.default_int_handler(number, frame)
        requested.set()
        observer.notice("stopping after this step; interrupt again to stop at once")

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield replace(observer, should_stop=lambda: requested.is_set() or observer.should_stop())
    except InterruptedRun as stopped:
        if not requested.is_set():
            raise
        raise KeyboardInterrupt(f"{stopped}; the same call resumes the run") from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
