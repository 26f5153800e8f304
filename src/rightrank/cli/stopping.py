"""Ctrl-C and SIGTERM while a selection runs: the step under way ends, checkpoints are written, and it stops."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rightrank.errors import TerminatedRun

GRACE_SECONDS = 20.0  # Kubernetes waits 30 s and Slurm 30 s by default between SIGTERM and SIGKILL


class StopRequest:
    """The first signal asks; the second, or the end of the grace after a SIGTERM, interrupts at once.

    An interruption at once loses no more than the steps since the last checkpoint.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.asked = False
        self.terminated = False
        self._notice = notice

    def interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        """SIGINT."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._notice("stopping after this step; Ctrl-C again stops at once")

    def terminate(self, _signal: int, _frame: FrameType | None) -> None:
        """SIGTERM."""
        if self.terminated:
            self.end_of_grace(_signal, _frame)
        self.asked = self.terminated = True
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        self._notice(f"asked to end: stopping after this step, or in {GRACE_SECONDS:.0f} s where it is")

    def end_of_grace(self, _signal: int, _frame: FrameType | None) -> None:
        """SIGALRM."""
        raise TerminatedRun("stopped in the middle of a step; the last checkpoint stands")


@contextmanager
def listening(notice: Callable[[str], None]) -> Iterator[StopRequest]:
    """Take the signals over for the block, and give them back."""
    stop = StopRequest(notice)
    handlers = {signal.SIGINT: stop.interrupt, signal.SIGTERM: stop.terminate, signal.SIGALRM: stop.end_of_grace}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
