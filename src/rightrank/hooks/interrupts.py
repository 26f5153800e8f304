"""Ctrl-C and SIGTERM during a selection: the current step ends, checkpoints are written, and the selection stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

from rightrank.schema.errors import InterruptedRun, TerminatedRun
from rightrank.schema.events import Observer


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


GRACE_SECONDS = 20.0  # Kubernetes waits 30 s and Slurm 30 s by default between SIGTERM and SIGKILL


class StopRequest:
    """The first signal requests a stop; the second, or the end of the grace period after a SIGTERM, interrupts at once.

    An interruption at once loses the steps since the last checkpoint.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.requested = False
        self.terminated = False
        self._notice = notice

    def interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        """SIGINT."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._notice("stopping after this step; Ctrl-C again stops at once")

    def terminate(self, _signal: int, _frame: FrameType | None) -> None:
        """SIGTERM."""
        if self.terminated:
            self.end_of_grace(_signal, _frame)
        self.requested = self.terminated = True
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        self._notice(f"received SIGTERM: stopping after this step, or in {GRACE_SECONDS:.0f} s at once")

    def end_of_grace(self, _signal: int, _frame: FrameType | None) -> None:
        """SIGALRM."""
        raise TerminatedRun("stopped in the middle of a step; the run resumes from the last checkpoint")


@contextmanager
def listening(notice: Callable[[str], None]) -> Iterator[StopRequest]:
    """Handle the signals within the block, and restore their handlers."""
    stop = StopRequest(notice)
    handlers = {signal.SIGINT: stop.interrupt, signal.SIGTERM: stop.terminate, signal.SIGALRM: stop.end_of_grace}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
