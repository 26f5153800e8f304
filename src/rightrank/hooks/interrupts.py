"""Ctrl-C and SIGTERM during a selection: the current step ends, checkpoints are written, and the selection stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from rightrank.runs.hook import Hook
from rightrank.schema.errors import TerminatedRun

GRACE_SECONDS = 20.0  # Kubernetes waits 30 s and Slurm 30 s by default between SIGTERM and SIGKILL


class Interrupts(Hook):
    """Handles the signals within a `with` block. The first one stops the run after its step, the second at once.

    The end of the grace period after a SIGTERM interrupts at once too; that loses the steps since the last checkpoint.
    Outside the main thread, or in a program that handles Ctrl-C itself, nothing changes.

    Args:
        say: receives a line for a person.
        of_process: this process only runs the selection: handle SIGTERM too.
    """

    def __init__(self, say: Callable[[str], None], *, of_process: bool = False) -> None:
        self.requested = False
        self.terminated = False
        self._say = say
        self._of_process = of_process
        self._handlers = {signal.SIGINT: self._interrupt}
        if of_process:
            self._handlers |= {signal.SIGTERM: self._terminate, signal.SIGALRM: self._end_of_grace}
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Interrupts:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and (self._of_process or signal.getsignal(signal.SIGINT) is signal.default_int_handler):
            self._before = {number: signal.signal(number, handler) for number, handler in self._handlers.items()}
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        if self.terminated:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def should_stop(self) -> bool:
        return self.requested

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._say("stopping after this step; Ctrl-C again stops at once")

    def _terminate(self, _signal: int, _frame: FrameType | None) -> None:
        if self.terminated:
            self._end_of_grace(_signal, _frame)
        self.requested = self.terminated = True
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        self._say(f"received SIGTERM: stopping after this step, or in {GRACE_SECONDS:.0f} s at once")

    def _end_of_grace(self, _signal: int, _frame: FrameType | None) -> None:
        raise TerminatedRun("stopped in the middle of a step; the run resumes from the last checkpoint")
