"""The interface between the pool and the workers: what starts, reaches and ends them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rightrank.executors.messages import Task, WorkerMessage


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker ended without being asked to."""

    reason: str
    killed: bool = False  # by SIGKILL, as the system does when memory is short


class Crew(Protocol):
    """Starts, reaches and ends workers of one kind: local processes, Ray actors, or a simulation.

    An implementation must keep these rules:

    - The pool chooses the workers' names and never reuses one.
    - All methods are called from one thread. `start`, `assign` and `request_stop` return at once: while they block,
      the pool sees neither hangs nor the user's request to stop.
    - After `start(w)`, the first message of `w` is `Ready`, `Refused` or `WorkerLost`.
    - Messages of one worker arrive in the order in which it sent them, none twice.
    - When a worker ends by itself, `messages` reports one `WorkerLost`, after everything that it sent, and nothing
      of that worker afterwards.
    - `assign` and `request_stop` never raise for a worker that has just ended; its `WorkerLost` follows.
    - After `end(w)` the worker holds no memory or device. Late messages of `w` are allowed: the pool ignores them.

    For example, workers in this process, for tests (each `assign` blocks until its task has ended):

        class InlineCrew:
            def __init__(self, setup: WorkerSetup) -> None:
                self._setup, self._workers, self._sent = setup, {}, []

            def start(self, worker: str) -> None:
                self._workers[worker] = Worker(lambda message: self._sent.append((worker, message)))
                self._workers[worker].set_up(self._setup)

            def assign(self, worker: str, task: Task) -> None:
                self._workers[worker].run_task(task)

            def request_stop(self, worker: str) -> None:
                self._workers[worker].stop()

            def end(self, worker: str) -> None:
                self._workers.pop(worker).close()

            def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]:
                sent, self._sent = self._sent, []
                return sent

            def close(self) -> None:
                for worker in list(self._workers):
                    self.end(worker)
    """

    def start(self, worker: str) -> None:
        """Start a worker and send it its `WorkerSetup`; return without waiting for it to be ready."""
        ...

    def assign(self, worker: str, task: Task) -> None:
        """Send a task to an idle worker."""
        ...

    def request_stop(self, worker: str) -> None:
        """Ask the worker to stop its task at the next step, save checkpoints, and send `TaskEnded`."""
        ...

    def end(self, worker: str) -> None:
        """End the worker at once, whatever it is doing."""
        ...

    def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]:
        """`(worker, message)` for everything that has arrived; wait at most `seconds` for the first."""
        ...

    def close(self) -> None:
        """End all workers and release what the crew holds."""
        ...
