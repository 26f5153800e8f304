"""Custom trainers: a user's function is called with a task, in this process, in a fresh one, or on Ray."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias

from rightrank.errors import InputError, InterruptedRun, SettingsError
from rightrank.records import (
    Trial,
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialOutcome,
    TrialResult,
    TrialStarted,
    TrialTask,
)
from rightrank.records.observer import Observer

TrainFunction: TypeAlias = Callable[[TrialTask], Mapping[str, float] | TrialResult]
EvaluateFunction: TypeAlias = Callable[[Path, TrialTask], Mapping[str, float] | TrialResult]
Call: TypeAlias = Callable[[TrialTask], object]  # returns what the user's function returned, unchecked
NO_RESULT = "its process ended without a result"


class TrainerError(Exception):
    """The trainer returned no usable result; the message states why."""


@dataclass(frozen=True, slots=True)
class FolderEvaluation:
    """A user's `evaluate` as a function of a task alone: the adapter is in the task's folder."""

    evaluate: EvaluateFunction

    def __call__(self, task: TrialTask) -> Mapping[str, float] | TrialResult:
        return self.evaluate(task.folder, task)


class CustomExecutor:
    """Runs trials through a function. An error inside it fails the trial and not the run."""

    def __init__(
        self,
        call: Call,
        metric: str,
        examples: int | None,
        folder_of: Callable[[str], Path],
        observer: Observer,
        parallel: int = 1,
        evaluate: Call | None = None,
    ) -> None:
        self._call = call
        self._evaluate = evaluate  # of an adapter in the task's folder; None: adapters are not truncated
        self._metric = metric
        self._examples = examples  # held-out examples that earlier trials scored; None: not known yet
        self._folder_of = folder_of
        self._observer = observer
        self._parallel = parallel  # calls at the same time; above 1, each in its own process

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        for ended, outcome in enumerate(
            self._run_in_order(trials) if self._parallel == 1 else self._run_in_parallel(trials), 1
        ):
            yield outcome
            if self._observer.should_stop():
                raise InterruptedRun(f"stopped after {ended} trials")

    def _run_in_order(self, trials: Sequence[Trial]) -> Iterator[TrialOutcome]:
        for trial in trials:
            self._started(trial)
            yield self._run_one(trial)

    def _run_in_parallel(self, trials: Sequence[Trial]) -> Iterator[TrialOutcome]:
        """Yield outcomes as calls end; if the iterator is closed early, wait for the running calls."""
        waiting = deque(trials)
        running: set[Future[TrialOutcome]] = set()
        with ThreadPoolExecutor(self._parallel) as threads:  # threads only wait for processes
            while waiting or running:
                while waiting and len(running) < self._parallel:
                    trial = waiting.popleft()
                    self._started(trial)
                    running.add(threads.submit(self._run_one, trial))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)

    def _started(self, trial: Trial) -> None:
        self._observer.on_event(TrialStarted(trial_id=trial.trial_id, **trial.arm.model_dump()))

    def _run_one(self, trial: Trial) -> TrialOutcome:
        folder = self._folder_of(trial.trial_id)
        arm, call = trial.arm, self._call
        if arm.truncate_from is not None and self._evaluate is not None:
            call = self._evaluate
            try:
                write_truncated(self._folder_of(arm.truncate_from), folder, arm.rank)
            except InputError as error:
                return TrialFailed(trial_id=trial.trial_id, **arm.model_dump(), error="error", reason=str(error))
        folder.mkdir(parents=True, exist_ok=True)
        task = TrialTask(
            trial_id=trial.trial_id,
            rank=arm.rank,
            learning_rate=arm.learning_rate,
            lora_alpha=arm.lora_alpha,
            seed=arm.seed,
            steps=arm.steps,
            folder=folder,
        )
        begun = time.perf_counter()
        try:
            result = parse_result(call(task), self._metric, self._examples)
        except TrainerError as error:
            return TrialFailed(trial_id=trial.trial_id, **arm.model_dump(), error="error", reason=str(error))
        seconds = time.perf_counter() - begun
        bad = next((name for name, value in _numbers(result) if not math.isfinite(value)), None)
        if bad is not None:
            return TrialDiverged(
                trial_id=trial.trial_id, **arm.model_dump(), step=arm.steps, reason=f"{bad} is not a finite number"
            )
        self._examples = len(result.item_scores) if result.item_scores is not None else self._examples
        return outcome_of(trial, result, self._metric, seconds)


def write_truncated(parent: Path, folder: Path, rank: int) -> None:
    """Write the PEFT adapter in `parent`, truncated to `rank` by singular values, to `folder`, which is replaced.

    Raises:
        InputError: no PEFT adapter there, or of a kind that can't be truncated.
    """
    from rightrank.io.adapter_folder import open_adapter  # these bring torch, which a trainer may not need
    from rightrank.probe.rank_choice import RankChoice
    from rightrank.probe.resized_adapter import write_resized

    adapter = open_adapter(parent)
    ranks = {module.name: min(rank, module.rank) for module in adapter.modules}
    shutil.rmtree(folder, ignore_errors=True)
    write_resized(adapter, folder, RankChoice(ranks, f"rank {rank} at most"))


def parse_result(returned: object, metric: str, examples: int | None) -> TrialResult:
    """Check what a trainer returned and convert it to a `TrialResult`.

    Raises:
        TrainerError: not a mapping of numbers, the metric is missing, or scores of other examples than before.
    """
    if isinstance(returned, Mapping):
        metrics: dict[str, float] = {}
        for name, value in returned.items():
            if not isinstance(name, str) or isinstance(value, bool) or not hasattr(value, "__float__"):
                raise TrainerError(f"train returned {name!r}: {_short(value)}; return names with numbers")
            metrics[name] = float(value)
        returned = TrialResult(metrics=metrics)
    if not isinstance(returned, TrialResult):
        raise TrainerError(
            f"train returned {_short(returned)}; return a mapping such as {{{metric!r}: 1.23}}, or a TrialResult"
        )
    if metric not in returned.metrics:
        found = ", ".join(map(repr, returned.metrics)) or "nothing"
        raise TrainerError(f"train returned no {metric!r} (it returned {found}); return it, or give another metric=")
    scores, weights = returned.item_scores, returned.item_weights
    if scores is not None and len(scores) == 0:
        raise TrainerError("train returned an empty list of item_scores; return one score per example, or None")
    if scores is not None and examples is not None and len(scores) != examples:
        raise TrainerError(
            f"train returned {len(scores)} item_scores, earlier trials {examples}; score the same examples in the same order in every trial"
        )
    if weights is not None and (scores is None or len(weights) != len(scores) or min(weights) <= 0):
        raise TrainerError(
            "train returned item_weights that do not match item_scores; return one weight above 0 per example"
        )
    return returned


def call_inline(train: TrainFunction) -> Call:
    """Call `train` in this process."""

    def call(task: TrialTask) -> object:
        try:
            return train(task)
        except Exception as error:
            raise TrainerError(_message(error)) from error

    return call


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
        process = context.Process(target=_answer, args=(sender, train, task), daemon=True)
        process.start()
        sender.close()
        try:
            return _received(receiver, timeout_seconds)
        finally:
            process.kill()
            process.join()
            receiver.close()

    return call


def call_on_ray(train: TrainFunction) -> Call:
    """Call `train` as a task of the Ray cluster at `RAY_ADDRESS`, or on this machine; with a GPU if the cluster has any.

    Ray repeats a call whose node is lost.

    Raises:
        MissingExtraError, RunError: Ray is not installed, or no cluster can be joined.
    """
    from rightrank.executors.ray_cluster import connected

    ray = connected(os.environ.get("RAY_ADDRESS"))
    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=2, max_calls=1)(call_inline(train))

    def call(task: TrialTask) -> object:
        try:
            return ray.get(remote.remote(task))
        except ray.exceptions.RayTaskError as error:  # what `train` raised
            raise TrainerError(str(error.cause)) from None
        except ray.exceptions.RayError as error:
            raise TrainerError(f"{NO_RESULT} ({type(error).__name__})") from None

    return call


def _answer(sender: Connection, train: TrainFunction, task: TrialTask) -> None:
    """Runs in the new process; sends `(True, result)` or `(False, reason)`."""
    try:
        answer: tuple[bool, object] = (True, call_inline(train)(task))
    except TrainerError as error:
        answer = (False, str(error))
    sender.send(answer)


def _received(receiver: Connection, timeout_seconds: float | None) -> object:
    if not receiver.poll(timeout_seconds):
        raise TrainerError(f"train took longer than {timeout_seconds:g} s and was killed")
    try:
        succeeded, answer = receiver.recv()
    except EOFError:
        raise TrainerError(NO_RESULT) from None
    if not succeeded:
        raise TrainerError(str(answer))
    return answer


def outcome_of(trial: Trial, result: TrialResult, metric: str, seconds: float) -> TrialFinished:
    return TrialFinished(
        trial_id=trial.trial_id,
        **trial.arm.model_dump(),
        value=result.metrics[metric],
        metrics=result.metrics,
        item_losses=[],
        item_tokens=[],
        item_scores=result.item_scores,
        item_weights=result.item_weights,
        train_value=result.train_value,
        points=result.points,
        trainable_parameters=result.trainable_parameters,
        train_seconds=seconds if result.train_seconds is None else result.train_seconds,
        train_tokens=result.train_tokens,
        eval_seconds=result.eval_seconds,
        peak_bytes=result.peak_bytes,
    )


def _numbers(result: TrialResult) -> Iterator[tuple[str, float]]:
    yield from result.metrics.items()
    yield from (("an example's score", score) for score in result.item_scores or [])
    if result.train_value is not None:
        yield "train_value", result.train_value
    yield from (("a point's value", point.value) for point in result.points)


def _message(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"train raised {type(error).__name__}" + (f": {text}" if text else "")


def _short(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
