"""Custom trainers: a user's function trains each trial, and what it returns and reports becomes the outcome."""

from __future__ import annotations

import math
import multiprocessing
import pickle
import queue
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias

from pydantic import ValidationError

from rightrank.decision.collapse import Collapse, collapse_of
from rightrank.schema.errors import (
    AllTrialsFailedError,
    InputError,
    InterruptedRun,
    NotFiniteError,
    ReportError,
    SettingsError,
    quoted,
)
from rightrank.schema.events import Listener
from rightrank.schema.trials import (
    EvalPoint,
    Trial,
    TrialCollapsed,
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialLook,
    TrialOutcome,
    TrialResult,
    TrialStarted,
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


@dataclass(frozen=True, slots=True)
class Measure:
    """The metric that decides, and what counts as a collapse in it."""

    metric: str
    higher_is_better: bool = False
    collapse_drop: float | None = None  # None: collapses are not judged


class CustomExecutor:
    """Runs trials through a function. An error inside it fails the trial and not the run.

    A result that can't be used ends the run at once, unless the same function has returned a good one before.
    """

    def __init__(
        self,
        call: Call,
        measure: Measure,
        earlier: Sequence[TrialFinished],
        folder_of: Callable[[str], Path],
        listener: Listener,
        parallel: int = 1,
        evaluate: Call | None = None,
    ) -> None:
        self._call = call
        self._evaluate = evaluate  # of an adapter in the task's folder; None: adapters are not truncated
        self._measure = measure
        self._base = next((trial for trial in earlier if trial.rank == 0), None)
        # The held-out examples that earlier trials scored, at the end and at their looks; None: not known yet.
        self._examples = next((len(trial.item_scores) for trial in earlier if trial.item_scores), None)
        scored = (point.item_scores for trial in earlier for point in trial.points)
        self._look_examples = next((len(scores) for scores in scored if scores), None)
        self._folder_of = folder_of
        self._listener = listener
        self._parallel = parallel  # calls at the same time
        # The functions that have returned well.
        self._good = {"train" if trial.truncate_from is None else "evaluate" for trial in earlier}
        self._wrong: str | None = None  # what the first result was that can't be used

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        for ended, outcome in enumerate(self._outcomes(trials), 1):
            yield outcome
            if self._wrong is None and self._listener.should_stop():
                raise InterruptedRun(f"stopped after {ended} trials")
        if self._wrong is not None:
            raise AllTrialsFailedError(
                f"{self._wrong}; what has finished is kept: correct the function, and call again with the same arguments"
            )

    def _outcomes(self, trials: Sequence[Trial]) -> Iterator[TrialOutcome]:
        """Yield outcomes as calls end; if the iterator is closed early, wait for the running calls.

        A single call runs on this thread. Looks and ends of several calls pass through one queue, so that this thread alone
        writes to the journal.
        """
        waiting, running = deque(trials), 0
        arrived: queue.SimpleQueue[TrialLook | Future[TrialOutcome]] = queue.SimpleQueue()
        with ThreadPoolExecutor(self._parallel) as threads:
            while (waiting and self._wrong is None) or running:
                while waiting and self._wrong is None and running < self._parallel:
                    trial = waiting.popleft()
                    self._listener.on_event(TrialStarted(**trial.fields))
                    if self._parallel == 1:
                        yield self._run_one(trial, self._listener.on_event)
                        continue
                    threads.submit(self._run_one, trial, arrived.put).add_done_callback(arrived.put)
                    running += 1
                if not running:
                    return
                event = arrived.get()
                if isinstance(event, TrialLook):
                    self._listener.on_event(event)
                else:
                    running -= 1
                    yield event.result()

    def _run_one(self, trial: Trial, on_look: Callable[[TrialLook], None]) -> TrialOutcome:
        arm, folder = trial.arm, self._folder_of(trial.trial_id)
        name, call = "train", self._call
        if arm.truncate_from is not None and self._evaluate is not None:
            name, call = "evaluate", self._evaluate
            try:
                _write_truncated(self._folder_of(arm.truncate_from), folder, arm.rank)
            except InputError as error:
                return TrialFailed(**trial.fields, error="error", reason=str(error))
        folder.mkdir(parents=True, exist_ok=True)
        looks: list[EvalPoint] = []

        def receive(point: EvalPoint) -> None:
            looks[:] = [*(look for look in looks if look.step < point.step), point]
            on_look(TrialLook(trial_id=trial.trial_id, **point.model_dump(exclude={"train_value"})))

        fields = arm.model_dump(include={"rank", "learning_rate", "lora_alpha", "seed", "steps"})
        drop = self._measure.collapse_drop
        task = TrialTask(trial_id=trial.trial_id, folder=folder, collapse_drop=drop, **fields).reporting_to(receive)
        begun = time.perf_counter()
        try:
            result = _parse_result(call(task), self._measure.metric, self._examples)
            by_step = {
                point.step: point for point in (*looks, *result.points)
            }  # one that was returned replaces a report
            result = result.model_copy(update={"points": [by_step[step] for step in sorted(by_step)]})
            self._require_same_looks(result.points)
        except TrainerDivergedError as error:
            return TrialDiverged(**trial.fields, step=looks[-1].step if looks else 0, reason=str(error))
        except TrainerError as error:
            reason = f"{name} {error}"
            if isinstance(error, WrongResultError) and name not in self._good:
                self._wrong = self._wrong or reason
            return TrialFailed(**trial.fields, error="error", reason=reason)
        self._good.add(name)
        return self._judged(trial, result, time.perf_counter() - begun)

    def _judged(self, trial: Trial, result: TrialResult, seconds: float) -> TrialOutcome:
        """The outcome of a trial whose function returned."""
        bad = next((name for name, value in _numbers_of(result) if not math.isfinite(value)), None)
        if bad is not None:
            return TrialDiverged(**trial.fields, step=trial.arm.steps, reason=f"{bad} is not a finite number")
        collapse = self._collapse_of(trial, result)
        if collapse is not None:
            return TrialCollapsed(
                **trial.fields,
                step=collapse.last.step,
                value=collapse.last.value,
                best_step=collapse.best.step,
                best_value=collapse.best.value,
                reason=collapse.reason,
                points=result.points,
                train_seconds=seconds if result.train_seconds is None else result.train_seconds,
            )
        self._examples = len(result.item_scores) if result.item_scores is not None else self._examples
        outcome = outcome_of(trial, result, self._measure.metric, seconds)
        self._base = outcome if trial.arm.rank == 0 else self._base
        return outcome

    def _collapse_of(self, trial: Trial, result: TrialResult) -> Collapse | None:
        """A fall along the looks, or to an end below the base."""
        drop, higher = self._measure.collapse_drop, self._measure.higher_is_better
        if drop is None or trial.arm.rank == 0:
            return None
        end = EvalPoint(
            step=trial.arm.steps, value=result.metrics[self._measure.metric], item_scores=result.item_scores
        )
        start = [EvalPoint(step=0, value=self._base.value, item_scores=self._base.item_scores)] if self._base else []
        return collapse_of(result.points, drop, higher) or collapse_of([*start, end], drop, higher)

    def _require_same_looks(self, points: Sequence[EvalPoint]) -> None:
        """Check that all looks score as many examples, in this trial and in earlier ones."""
        counts = {len(point.item_scores) for point in points if point.item_scores is not None}
        known = counts if self._look_examples is None else counts | {self._look_examples}
        if len(known) > 1 or 0 in known:
            listed = " and ".join(map(str, sorted(known)))
            raise TrainerError(f"reported {listed} item_scores; score the same examples at every look of every trial")
        self._look_examples = next(iter(known), None)


def _write_truncated(parent: Path, folder: Path, rank: int) -> None:
    """Write the PEFT adapter in `parent`, truncated to `rank` by singular values, to `folder`, which is replaced.

    Raises:
        InputError: no PEFT adapter there, or of a kind that can't be truncated.
    """
    from rightrank.adapters.rewrite import RankChoice, write_resized
    from rightrank.models.adapter_files import open_adapter  # these bring torch, which a trainer may not need

    adapter = open_adapter(parent)
    ranks = {module.name: min(rank, module.rank) for module in adapter.modules}
    shutil.rmtree(folder, ignore_errors=True)
    write_resized(adapter, folder, RankChoice(ranks, f"rank {rank} at most"))


def _parse_result(returned: object, metric: str, examples: int | None) -> TrialResult:
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


def outcome_of(trial: Trial, result: TrialResult, metric: str, seconds: float) -> TrialFinished:
    returned = dict(result) | {"train_seconds": seconds if result.train_seconds is None else result.train_seconds}
    return TrialFinished(**trial.fields, **returned, value=result.metrics[metric], item_losses=[], item_tokens=[])


def _numbers_of(result: TrialResult) -> Iterator[tuple[str, float]]:
    yield from result.metrics.items()
    yield from (("an example's score", score) for score in result.item_scores or [])
    if result.train_value is not None:
        yield "train_value", result.train_value
    yield from (("a point's value", point.value) for point in result.points)
    yield from (("a point's score", score) for point in result.points for score in point.item_scores or [])
