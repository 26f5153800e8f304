"""How a user's function is called, here or in a process of its own, and the check of what it returns."""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias

from pydantic import ValidationError

from rightrank.schema.errors import (
    NotFiniteError,
    ReportError,
    SettingsError,
    quoted,
)
from rightrank.schema.trials import (
    EvalPoint,
    TrialResult,
    TrialTask,
)

TrainFunction: TypeAlias = Callable[[TrialTask], Mapping[str, float] | TrialResult]
EvaluateFunction: TypeAlias = Callable[[Path, TrialTask], Mapping[str, float] | TrialResult]
Call: TypeAlias = Callable[[TrialTask], object]  # returns what the user's function returned, unchecked
RESULT_RECORDS = ("TrialResult", "EvalPoint")
NO_RESULT = "ended its process without a result (a script calls it below `if __name__ == '__main__':`)"


class TrainerError(Exception):
    """The function gave no usable result; the message says why, after the function's name."""


class WrongResultError(TrainerError):
    """What the function returned or reported can't be used, whatever it trained: the function is wrong."""


class TrainerDivergedError(TrainerError):
    """The function met a number that is not finite; the message stands alone."""


def call_inline(train: TrainFunction) -> Call:
    def call(task: TrialTask) -> object:
        try:
            return train(task)
        except NotFiniteError as error:
            raise TrainerDivergedError(str(error)) from error
        except ReportError as error:
            raise WrongResultError(str(error)) from error
        except ValidationError as error:
            if error.title not in RESULT_RECORDS:
                raise TrainerError(_raised(error)) from error
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "its fields"
            fields = (
                f"; the fields: {', '.join(TrialResult.model_fields)}" if first["type"] == "extra_forbidden" else ""
            )
            raise WrongResultError(
                f"made a {error.title} of {place} = {quoted(first['input'])}: {first['msg']}{fields}"
            ) from error
        except Exception as error:
            raise TrainerError(_raised(error)) from error

    return call


def _raised(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"raised {type(error).__name__}" + (f": {text}" if text else "")


def call_in_process(train: TrainFunction, timeout_seconds: float | None) -> Call:
    """Call `train` in a fresh process each time, and kill the process when it exceeds the limit.

    Raises:
        SettingsError: the function can't be pickled, as a call in another process needs.
    """
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
            raise TrainerError(f"took longer than {timeout_seconds:g} s and was killed")
        try:
            answer = receiver.recv()
        except EOFError:
            raise TrainerError(NO_RESULT) from None
        if isinstance(answer, TrainerError):
            raise answer
        if not isinstance(answer, EvalPoint):
            return answer
        task.report(answer.step, answer.value, answer.item_scores)


def parse_result(returned: object, metric: str, examples: int | None) -> TrialResult:
    """Check what a function returned and convert it to a `TrialResult`.

    Raises:
        WrongResultError: not a mapping of numbers, the metric is missing, or scores of other examples than before.
    """
    if isinstance(returned, Mapping):
        metrics: dict[str, float] = {}
        for name, value in returned.items():
            if not isinstance(name, str) or isinstance(value, bool) or not hasattr(value, "__float__"):
                raise WrongResultError(
                    f"returned {name!r}: {type(value).__name__} {quoted(value)}; return names with numbers"
                )
            metrics[name] = float(value)
        returned = TrialResult(metrics=metrics)
    if not isinstance(returned, TrialResult):
        raise WrongResultError(
            f"returned {type(returned).__name__} {quoted(returned)}; return a mapping such as {{{metric!r}: 1.23}}, or a TrialResult"
        )
    if metric not in returned.metrics:
        found = ", ".join(map(repr, returned.metrics)) or "nothing"
        raise WrongResultError(f"returned no {metric!r} (it returned {found}); return it, or give another metric=")
    scores, weights = returned.item_scores, returned.item_weights
    if scores is not None and len(scores) != (examples or len(scores) or 1):
        raise WrongResultError(
            f"returned {len(scores)} item_scores, earlier trials {examples or 'some'}; score the same examples in the same order in every trial"
        )
    if weights is not None and (scores is None or len(weights) != len(scores) or min(weights) <= 0):
        raise WrongResultError(
            "returned item_weights that do not match item_scores; return one weight above 0 per example"
        )
    return returned
