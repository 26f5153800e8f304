"""Custom trainers: a user's function trains each trial, and what it returns and reports becomes the outcome."""

from __future__ import annotations

import math
import multiprocessing
import pickle
import queue
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias

from pydantic import ValidationError

from rightrank.decision.verdicts import Collapse, collapse_of
from rightrank.schema.errors import (
    AllTrialsFailedError,
    InputError,
    InterruptedRun,
    NotFiniteError,
    ReportError,
    SettingsError,
    quoted,
)
from rightrank.schema.events import Listener, Notice
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
Call: TypeAlias = Callable[[TrialTask], object]  # returns what the user's function returned, unchecked
RESULT_RECORDS = ("TrialResult", "EvalPoint")
NO_RESULT = "its process ended without a result"


class TrainerError(Exception):
    """The trainer returned no usable result; the message states why."""


class WrongResultError(TrainerError):
    """What the function returned or reported can't be used, whatever it trained: the function is wrong."""


class TrainerDivergedError(TrainerError):
    """The trainer met a number that is not finite."""


def call_inline(train: TrainFunction) -> Call:
    def call(task: TrialTask) -> object:
        try:
            return train(task)
        except NotFiniteError as error:
            raise TrainerDivergedError(str(error)) from error
        except ReportError as error:
            raise WrongResultError(f"train: {error}") from error
        except ValidationError as error:
            if error.title not in RESULT_RECORDS:
                raise TrainerError(_message(error)) from error
            raise WrongResultError(f"train made a {error.title} of {_field_of(error)}") from error
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
            f'executor="processes" starts processes that import {Path(file).name}: put the call below `if __name__ == "__main__":`'
        )


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


def _field_of(error: ValidationError) -> str:
    """The first wrong field of a record, what it got and what it takes."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "its fields"
    more = f"; the fields: {', '.join(TrialResult.model_fields)}" if first["type"] == "extra_forbidden" else ""
    return f"{place} = {quoted(first['input'])}: {first['msg'][:1].lower()}{first['msg'][1:]}{more}"


def _message(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"train raised {type(error).__name__}" + (f": {text}" if text else "")


EvaluateFunction: TypeAlias = Callable[[Path, TrialTask], Mapping[str, float] | TrialResult]
NO_LOOKS = (
    "train reports no values along the way, so a collapse can be seen only at the end of a training: call "
    "task.report(step, value, item_scores) in it, or return points"
)


@dataclass(frozen=True, slots=True)
class FolderEvaluation:
    """A user's `evaluate` as a function of a task alone: the adapter is in the task's folder."""

    evaluate: EvaluateFunction

    def __call__(self, task: TrialTask) -> Mapping[str, float] | TrialResult:
        return self.evaluate(task.folder, task)


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
        self._good = {
            trial.truncate_from is not None for trial in earlier
        }  # False: train returned well; True: evaluate
        self._wrong: str | None = None  # what the first result was that can't be used
        self._noticed = any(trial.rank > 0 for trial in earlier)

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        for ended, outcome in enumerate(
            self._run_in_order(trials) if self._parallel == 1 else self._run_in_parallel(trials), 1
        ):
            self._notice_missing_looks(outcome)
            yield outcome
            if self._wrong is not None and self._parallel == 1:
                break
            if self._listener.should_stop():
                raise InterruptedRun(f"stopped after {ended} trials")
        if self._wrong is not None:
            raise AllTrialsFailedError(
                f"{self._wrong}; what has finished is kept: correct the function, and call again with the same arguments"
            )

    def _run_in_order(self, trials: Sequence[Trial]) -> Iterator[TrialOutcome]:
        for trial in trials:
            self._started(trial)
            yield self._run_one(trial, self._listener.on_event)

    def _run_in_parallel(self, trials: Sequence[Trial]) -> Iterator[TrialOutcome]:
        """Yield outcomes as calls end; if the iterator is closed early, wait for the running calls.

        Looks and ends of all calls pass through one queue, so that this thread alone writes to the journal.
        """
        waiting, running = deque(trials), 0
        arrived: queue.SimpleQueue[TrialLook | Future[TrialOutcome]] = queue.SimpleQueue()
        with ThreadPoolExecutor(self._parallel) as threads:
            while (waiting and self._wrong is None) or running:
                while waiting and self._wrong is None and running < self._parallel:
                    trial = waiting.popleft()
                    self._started(trial)
                    threads.submit(self._run_one, trial, arrived.put).add_done_callback(arrived.put)
                    running += 1
                event = arrived.get()
                if isinstance(event, TrialLook):
                    self._listener.on_event(event)
                    continue
                running -= 1
                yield event.result()

    def _started(self, trial: Trial) -> None:
        self._listener.on_event(TrialStarted(**trial.fields))

    def _notice_missing_looks(self, outcome: TrialOutcome) -> None:
        """One notice for a trainer whose first result came without values along the way."""
        judged = self._measure.collapse_drop is not None and outcome.rank > 0
        if self._noticed or not judged or not isinstance(outcome, TrialFinished):
            return
        self._noticed = True
        if not outcome.points:
            self._listener.on_event(Notice(text=NO_LOOKS))

    def _run_one(self, trial: Trial, on_look: Callable[[TrialLook], None]) -> TrialOutcome:
        folder = self._folder_of(trial.trial_id)
        arm, call = trial.arm, self._call
        if arm.truncate_from is not None and self._evaluate is not None:
            call = self._evaluate
            try:
                _write_truncated(self._folder_of(arm.truncate_from), folder, arm.rank)
            except InputError as error:
                return TrialFailed(**trial.fields, error="error", reason=str(error))
        folder.mkdir(parents=True, exist_ok=True)
        looks: list[EvalPoint] = []

        def receive(point: EvalPoint) -> None:
            looks[:] = [*(look for look in looks if look.step < point.step), point]
            on_look(
                TrialLook(trial_id=trial.trial_id, step=point.step, value=point.value, item_scores=point.item_scores)
            )

        task = TrialTask(
            trial_id=trial.trial_id,
            rank=arm.rank,
            learning_rate=arm.learning_rate,
            lora_alpha=arm.lora_alpha,
            seed=arm.seed,
            steps=arm.steps,
            folder=folder,
            collapse_drop=self._measure.collapse_drop,
        ).reporting_to(receive)
        begun = time.perf_counter()
        try:
            result = _parse_result(call(task), self._measure.metric, self._examples)
            result = result.model_copy(update={"points": merged(looks, result.points)})
            self._require_same_looks(result.points)
        except TrainerDivergedError as error:
            step = looks[-1].step if looks else 0
            return TrialDiverged(**trial.fields, step=step, reason=str(error))
        except TrainerError as error:
            if isinstance(error, WrongResultError) and (call is self._evaluate) not in self._good:
                self._wrong = self._wrong or self._named(str(error), call)
            return TrialFailed(**trial.fields, error="error", reason=self._named(str(error), call))
        self._good.add(call is self._evaluate)
        return self._judged(trial, result, time.perf_counter() - begun)

    def _named(self, reason: str, call: Call) -> str:
        """The reason with the name of the function that was called."""
        return f"evaluate{reason[5:]}" if call is self._evaluate and reason.startswith(("train ", "train:")) else reason

    def _judged(self, trial: Trial, result: TrialResult, seconds: float) -> TrialOutcome:
        """The outcome of a trial whose function returned."""
        bad = next((name for name, value in _numbers_of(result) if not math.isfinite(value)), None)
        if bad is not None:
            return TrialDiverged(
                **trial.fields,
                step=trial.arm.steps,
                reason=f"{bad} is not a finite number",
            )
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
            raise TrainerError(f"looks have {listed} item_scores; score the same examples at every look of every trial")
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


def merged(reported: Sequence[EvalPoint], returned: Sequence[EvalPoint]) -> list[EvalPoint]:
    """The looks of a trial by step; one that was returned replaces one that was reported."""
    by_step = {point.step: point for point in (*reported, *returned)}
    return [by_step[step] for step in sorted(by_step)]


def _parse_result(returned: object, metric: str, examples: int | None) -> TrialResult:
    """Check what a trainer returned and convert it to a `TrialResult`.

    Raises:
        WrongResultError: not a mapping of numbers, the metric is missing, or scores of other examples than before.
    """
    if isinstance(returned, Mapping):
        metrics: dict[str, float] = {}
        for name, value in returned.items():
            if not isinstance(name, str) or isinstance(value, bool) or not hasattr(value, "__float__"):
                raise WrongResultError(
                    f"train returned {name!r}: {type(value).__name__} {quoted(value)}; return names with numbers"
                )
            metrics[name] = float(value)
        returned = TrialResult(metrics=metrics)
    if not isinstance(returned, TrialResult):
        raise WrongResultError(
            f"train returned {type(returned).__name__} {quoted(returned)}; return a mapping such as {{{metric!r}: 1.23}}, or a TrialResult"
        )
    if metric not in returned.metrics:
        found = ", ".join(map(repr, returned.metrics)) or "nothing"
        other = f"metric={next(iter(returned.metrics))!r}" if returned.metrics else "another metric="
        raise WrongResultError(f"train returned no {metric!r} (it returned {found}); return it, or give {other}")
    scores, weights = returned.item_scores, returned.item_weights
    if scores is not None and len(scores) == 0:
        raise WrongResultError("train returned an empty list of item_scores; return one score per example, or None")
    if scores is not None and examples is not None and len(scores) != examples:
        raise WrongResultError(
            f"train returned {len(scores)} item_scores, earlier trials {examples}; score the same examples in the same order in every trial"
        )
    if weights is not None and (scores is None or len(weights) != len(scores) or min(weights) <= 0):
        raise WrongResultError(
            "train returned item_weights that do not match item_scores; return one weight above 0 per example"
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
