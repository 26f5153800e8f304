"""How a user's function is called: in this process, in a fresh one, or on Ray. Its reports arrive as they are made."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

from rightrank.errors import NotFiniteError, SettingsError
from rightrank.records import EvalPoint, TrialResult, TrialTask

TrainFunction: TypeAlias = Callable[[TrialTask], Mapping[str, float] | TrialResult]
Call: TypeAlias = Callable[[TrialTask], object]  # returns what the user's function returned, unchecked
NO_RESULT = "its process ended without a result"
POLL_SECONDS = 0.2  # between looks at the reports of a call on Ray


class TrainerError(Exception):
    """The trainer returned no usable result; the message states why."""


class TrainerDivergedError(TrainerError):
    """The trainer met a number that is not finite."""


def call_inline(train: TrainFunction) -> Call:
    def call(task: TrialTask) -> object:
        try:
            return train(task)
        except NotFiniteError as error:
            raise TrainerDivergedError(str(error)) from error
        except Exception as error:
            raise TrainerError(_message(error)) from error

    return call


def call_in_process(train: TrainFunction, timeout_seconds: float | None) -> Call:
    """Call `train` in a fresh process each time, and kill the process when it exceeds the limit.

    Raises:
        SettingsError: the function can't be pickled, as a call in another process needs, or the script has no guard.
    """
    _require_guard()
    try:
        pickle.dumps(train)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SettingsError(
            f"train can't be sent to another process ({error}); define it at the top level of a module"
        ) from None

    def call(task: TrialTask) -> object:
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(sender, train, task.reporting_to(None)), daemon=True)
        process.start()
        sender.close()
        try:
            return _received(receiver, timeout_seconds, task)
        finally:
            process.kill()
            process.join()
            receiver.close()

    return call


def _require_guard() -> None:
    """Refuse a script without a guard: every new process imports it, and would begin all of its work again.

    Raises:
        SettingsError: the script that runs has no `if __name__ == "__main__":`.
    """
    file = getattr(sys.modules.get("__main__"), "__file__", None)  # None in a notebook or an interactive session
    if file is None or not Path(file).is_file():
        return
    if "__name__" not in Path(file).read_text(encoding="utf-8", errors="replace"):
        raise SettingsError(
            f'where="process" starts processes that import {Path(file).name}: put the call below `if __name__ == "__main__":`'
        )


def call_on_ray(train: TrainFunction) -> Call:
    """Call `train` as a task of the Ray cluster at `RAY_ADDRESS`, or on this machine; with a GPU if the cluster has any.

    Ray repeats a call whose node is lost. Reports pass through a queue, which is an actor without a CPU of its own.

    Raises:
        MissingExtraError, RunError: Ray is not installed, or no cluster can be joined.
    """
    from rightrank.executors.ray_cluster import connected

    ray = connected(os.environ.get("RAY_ADDRESS"))
    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    options: dict[str, int] = {"num_cpus": 1, "num_gpus": gpus, "max_retries": 2, "max_calls": 1}
    remote = ray.remote(**options)(_reporting_by_queue(call_inline(train)))

    def call(task: TrialTask) -> object:
        from ray.util.queue import Queue

        reports = Queue(actor_options={"num_cpus": 0})
        try:
            answer = remote.remote(task.reporting_to(None), reports)
            while not ray.wait([answer], timeout=POLL_SECONDS)[0]:
                _pass_on(reports, task)
            _pass_on(reports, task)
            return ray.get(answer)
        except ray.exceptions.RayTaskError as error:  # what `train` raised
            kind = TrainerDivergedError if isinstance(error.cause, TrainerDivergedError) else TrainerError
            raise kind(str(error.cause)) from None
        except ray.exceptions.RayError as error:
            raise TrainerError(f"{NO_RESULT} ({type(error).__name__})") from None
        finally:
            reports.shutdown()

    return call


def _reporting_by_queue(call: Call) -> Callable[[TrialTask, Any], object]:
    def remote_call(task: TrialTask, reports: Any) -> object:
        return call(task.reporting_to(reports.put))

    return remote_call


def _pass_on(reports: Any, task: TrialTask) -> None:
    """Report to the task what waits in the queue."""
    for point in reports.get_nowait_batch(reports.qsize()):
        task.report(point.step, point.value, point.item_scores)


def _answer(sender: Connection, train: TrainFunction, task: TrialTask) -> None:
    """Runs in the new process; sends each report as it comes, then the result or the error."""
    try:
        sender.send(call_inline(train)(task.reporting_to(sender.send)))
    except TrainerError as error:
        sender.send(type(error)(*error.args))


def _received(receiver: Connection, timeout_seconds: float | None, task: TrialTask) -> object:
    """The result of a call in another process. Reports, which arrive before it, go to the task."""
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    while True:
        if not receiver.poll(None if deadline is None else max(0.0, deadline - time.monotonic())):
            raise TrainerError(f"train took longer than {timeout_seconds:g} s and was killed")
        try:
            answer = receiver.recv()
        except EOFError:
            raise TrainerError(NO_RESULT) from None
        if isinstance(answer, TrainerError):
            raise answer
        if not isinstance(answer, EvalPoint):
            return answer
        task.report(answer.step, answer.value, answer.item_scores)


def _message(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"train raised {type(error).__name__}" + (f": {text}" if text else "")
