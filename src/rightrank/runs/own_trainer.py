"""Selection with a custom trainer: a request whose executor calls the user's function, which trains with any library."""

from __future__ import annotations

import platform
import queue
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal, TypeAlias, TypedDict

from rightrank.decision.records import Records
from rightrank.decision.table import DROP_IN_MARGINS, collapse_of
from rightrank.runs.calls import EvaluateFunction, TrainFunction, TrialResult, TrialTask, call, parse_result
from rightrank.runs.executor import Executor, Plan
from rightrank.runs.folder import RunFolder
from rightrank.schema.errors import (
    AllTrialsFailedError,
    InputError,
    InterruptedRun,
    NotFiniteError,
    ReportError,
    RightrankError,
    SettingsError,
    did_you_mean,
)
from rightrank.schema.events import DataSummary, JournalRecord, Listener, RunStarted
from rightrank.schema.metrics import direction, unknown_direction
from rightrank.schema.settings import PROFILES, Goal, SelectSettings, settings_of_identity
from rightrank.schema.trials import (
    Arm,
    EvalPoint,
    Trial,
    TrialCollapsed,
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialLook,
    TrialOutcome,
    TrialStarted,
    content_hash,
)
from rightrank.search import make_strategy
from rightrank.search.history import space_of
from rightrank.version import __version__

_Called: TypeAlias = tuple[Trial, object, float]  # what the function returned, or the error that it raised; seconds


class TrainerSettings(TypedDict, total=False):
    """What `select_rank_with` takes beside its own parameters."""

    goal: Goal
    """"adapter" stops at the smallest adapter and needs `evaluate`; "training-rank" continues to the rank to train at."""
    profile: Literal["rl"] | None
    """"rl" for reinforcement learning: strategy "upward", metric "reward", seeds 0, 1 and 2, a margin of 0.02 where none is given; a
    training whose held-out value falls far below its own best has collapsed and has no result; the smallest rank is the answer
    where no difference between ranks can be shown."""
    strategy: str | None
    """None for "grid", or that of the profile."""
    lora_alpha: float
    """Passed to `train` in the task, and stated of the adapters; 32 by default."""
    max_steps: int
    """Passed to `train` in the task, as `steps`; 0 leaves the length to it."""
    workers: int
    """Calls at a time, in threads of this process: more than 1 for functions that wait for a service."""
    progress: bool
    """Show the progress on stderr."""


@dataclass(frozen=True, slots=True)
class OwnRequest:
    """A selection with a custom trainer, its arguments checked."""

    settings: SelectSettings
    metric: str
    higher_is_better: bool
    name: str  # of the function
    # "train"; "evaluate" of an adapter in a task's folder, without which the first question is not asked
    functions: Mapping[str, TrainFunction]
    evaluates_base: bool
    given: TrainerSettings

    @property
    def collapse_drop(self) -> float | None:
        """The fall of the held-out value that counts as a collapse; None but for reinforcement learning."""
        margin = self.settings.margin
        return None if self.given.get("profile") != "rl" or margin is None else DROP_IN_MARGINS * margin

    def plan(self, folder: RunFolder, journal: Sequence[JournalRecord], before: Plan | None = None) -> Plan:
        """As `rightrank.runs.executor.Asked`."""
        settings, steps = self.settings, self.settings.max_steps or 0
        space = replace(
            space_of(settings, steps),
            stages=False,
            evaluates_base=self.evaluates_base,
            truncates="evaluate" in self.functions,
            higher_is_better=self.higher_is_better,
        )
        return _OwnPlan(
            request=self,
            started=self._started(journal, steps),
            settings=settings,
            steps=steps,
            strategy=make_strategy(settings.strategy, space),
            owns_working_folders=False,
            advice="give another range of learning rates, and a new out",
        )

    def extended(self, settings: SelectSettings) -> OwnRequest:
        return replace(self, settings=settings)

    def _started(self, journal: Sequence[JournalRecord], steps: int) -> RunStarted:
        stated = {"trainer": self.name, "steps": steps}
        stated |= {"metric": self.metric, "higher_is_better": self.higher_is_better}
        values = {"model": None, "data": None, **stated}
        values |= self.settings.model_dump(mode="json", include=self.settings.model_fields_set - {"goal", "max_steps"})
        if self.given.get("profile") is not None:
            values["profile"] = self.given["profile"]
        begun = journal[0].settings if journal and isinstance(journal[0], RunStarted) else {}
        system = f"{platform.system()} {platform.machine()}"
        return RunStarted(
            rightrank_version=__version__,
            fingerprint=content_hash({"settings": settings_of_identity(values, begun)}),
            settings=values,
            environment={"python": platform.python_version(), "system": system, "device": "the trainer's own"},
            data=DataSummary(form="own", splits={}, splits_given=False, duplicates_across_splits=0),
            evaluation_items=[],
            metric=self.metric,
            higher_is_better=self.higher_is_better,
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def own_request(
    train: TrainFunction,
    evaluate: EvaluateFunction | None,
    metric: str | None,
    compared: Mapping[str, object],
    given: TrainerSettings,
) -> OwnRequest:
    """Check the arguments; the profile gives what is None.

    Args:
        compared: ranks, learning_rates, seeds and margin.

    Raises:
        SettingsError: an argument that is not allowed, or a metric without a known direction.
    """
    allowed = TrainerSettings.__annotations__
    if wrong := next((name for name in given if name not in allowed), None):
        raise SettingsError(f"{wrong} is no setting{did_you_mean(wrong, allowed)}; there are: {', '.join(allowed)}")
    if given.get("profile") not in PROFILES:
        raise SettingsError(f"unknown profile {given.get('profile')!r}; there is: rl")
    profile, ranks, with_base = PROFILES[given.get("profile")], compared["ranks"], False
    if isinstance(ranks, Sequence) and len(ranks) > 1 and 0 in ranks:
        compared, with_base = {**compared, "ranks": [rank for rank in ranks if rank]}, True
    sign, colon, name = (metric or "").partition(":")
    stated = sign == "max" if colon and sign in ("max", "min") else None
    metric = metric if stated is None else name
    values = {**compared, "strategy": given.get("strategy") or None}
    values |= {name: profile[name] for name in ("seeds", "margin", "strategy") if values[name] is None}
    values |= {"goal": given.get("goal", "training-rank"), "lora_alpha": given.get("lora_alpha", 32.0)}
    settings = SelectSettings(**values, max_steps=given.get("max_steps") or None)
    make_strategy(settings.strategy, space_of(settings, 1))  # refuses an unknown name first
    named, own = getattr(train, "metric", None), getattr(train, "higher_is_better", None)
    if isinstance(named, str) and metric not in (None, named):  # its scores by example are those of its own
        raise SettingsError(
            f"metric {metric!r}: {type(train).__name__} scores the examples by {named!r}; leave metric out, or give another train"
        )
    metric = metric or (named if isinstance(named, str) else profile["metric"])
    known = (stated, own if isinstance(own, bool) else None, direction(metric))
    higher = next((direct for direct in known if direct is not None), None)
    if higher is None:
        raise SettingsError(f"{unknown_direction(metric)}; give metric='max:{metric}' or 'min:{metric}'")
    if settings.goal == "adapter" and evaluate is None:
        raise SettingsError(
            "goal 'adapter' needs evaluate=, a function of an adapter folder and a TrialTask that returns held-out scores; "
            "give it, or goal 'training-rank'"
        )
    if not callable(train):
        raise SettingsError(f"train: got a {type(train).__name__}; give a function of one TrialTask")
    if evaluate is not None and not callable(evaluate):
        raise SettingsError(
            f"evaluate: got a {type(evaluate).__name__}; give a function of an adapter folder and a TrialTask"
        )
    workers: object = given.get("workers", 1)
    if not isinstance(workers, int) or workers < 1:
        raise SettingsError(f"workers: got {workers!r}; give a whole number from 1, of calls at a time")
    functions: dict[str, TrainFunction] = {"train": train}
    if evaluate is not None:
        functions["evaluate"] = lambda task: evaluate(task.folder, task)
    name = f"{getattr(train, '__module__', '?')}.{getattr(train, '__qualname__', type(train).__name__)}"
    return OwnRequest(settings, metric, higher, name, functions, with_base, given)


@dataclass(frozen=True, kw_only=True)
class _OwnPlan(Plan):
    request: OwnRequest

    def workplace(self, folder: RunFolder, listener: Listener, records: Records) -> AbstractContextManager[Executor]:
        return nullcontext(_Executor(self.request, folder, listener, records))


class _Executor:
    """Runs trials through a function. An error inside it fails the trial and not the run.

    A result that can't be used ends the run at once, unless the same function has returned a good one before.
    """

    def __init__(self, request: OwnRequest, folder: RunFolder, listener: Listener, records: Records) -> None:
        self._request, self._folder, self._listener, self._records = request, folder, listener, records
        self._wrong: str | None = None  # what the first result was that can't be used

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        for ended, called in enumerate(self._calls(trials), 1):
            yield self._outcome(*called)
            if self._wrong is None and self._listener.should_stop():
                raise InterruptedRun(f"stopped after {ended} trials")
        if self._wrong is not None:
            raise AllTrialsFailedError(
                f"{self._wrong}; what has finished is kept: correct the function, and call again with the same arguments"
            )

    def _calls(self, trials: Sequence[Trial]) -> Iterator[_Called]:
        """Yield calls as they end; if the iterator is closed early, wait for the running ones.

        A single call runs on this thread. Looks and ends of several calls pass through one queue, so that this thread alone
        writes to the journal.
        """
        waiting, running, parallel = deque(trials), 0, self._request.given.get("workers", 1)
        arrived: queue.SimpleQueue[TrialLook | Future[_Called]] = queue.SimpleQueue()
        with ThreadPoolExecutor(parallel) as threads:
            while (waiting and self._wrong is None) or running:
                while waiting and self._wrong is None and running < parallel:
                    trial = waiting.popleft()
                    self._listener.on_event(TrialStarted(**trial.fields))
                    if parallel == 1:
                        yield self._call(trial, self._listener.on_event)
                        continue
                    threads.submit(self._call, trial, arrived.put).add_done_callback(arrived.put)
                    running += 1
                if not running:
                    return
                event = arrived.get()
                if isinstance(event, TrialLook):
                    self._listener.on_event(event)
                else:
                    running -= 1
                    yield event.result()

    def _call(self, trial: Trial, on_look: Callable[[TrialLook], None]) -> _Called:
        arm, request, folder = trial.arm, self._request, self._folder.trial_adapter(trial.trial_id)

        def receive(point: EvalPoint) -> None:
            on_look(TrialLook(trial_id=trial.trial_id, **point.model_dump(exclude={"train_value"})))

        fields = arm.model_dump(include={"rank", "learning_rate", "lora_alpha", "seed", "steps"})
        drop = request.collapse_drop
        task = TrialTask(trial_id=trial.trial_id, folder=folder, collapse_drop=drop, receive=receive, **fields)
        begun = time.perf_counter()
        try:
            if arm.truncate_from is not None:
                _write_truncated(self._folder, arm.truncate_from, trial)
            folder.mkdir(parents=True, exist_ok=True)
            returned = call(request.functions[_function_of(arm)], task)
        except RightrankError as error:
            returned = error
        return trial, returned, time.perf_counter() - begun

    def _outcome(self, trial: Trial, returned: object, seconds: float) -> TrialOutcome:
        """What a call comes to; of a training that fell along its looks, or to an end below the base, its collapse."""
        arm, request, records = trial.arm, self._request, self._records
        looks, finished, name = records.looks.get(trial.trial_id, []), records.finished(), _function_of(trial.arm)
        examples = next((len(other.item_scores) for other in finished if other.item_scores), None)
        try:
            if isinstance(returned, RightrankError):
                raise returned
            result = parse_result(returned, request.metric, examples)
        except NotFiniteError as error:
            return TrialDiverged(**trial.fields, step=looks[-1].step if looks else 0, reason=f"{name} {error}")
        except RightrankError as error:  # of `InputError`, there is no adapter that can be truncated
            reason = str(error) if isinstance(error, InputError) else f"{name} {error}"
            # A function that knows no rank 0 may be right for all others.
            if (
                isinstance(error, ReportError)
                and arm.rank > 0
                and name not in {_function_of(other.arm) for other in finished if other.rank > 0}
            ):
                self._wrong = self._wrong or reason
            return TrialFailed(**trial.fields, error="error", reason=reason)
        by_step = {point.step: point for point in (*looks, *result.points)}  # one that was returned replaces a report
        result = result.model_copy(update={"points": [by_step[step] for step in sorted(by_step)]})
        outcome = outcome_of(trial, result, request.metric, seconds)
        if (drop := request.collapse_drop) is not None and arm.rank > 0:
            ends = [(0, base) for base in finished if base.rank == 0] + [(arm.steps, outcome)]
            along = [EvalPoint(step=step, value=end.value, item_scores=end.item_scores) for step, end in ends]
            for points in (result.points, along):
                if (fall := collapse_of(points, drop, request.higher_is_better)) is not None:
                    kept = {"points": result.points, "train_seconds": outcome.train_seconds}
                    return TrialCollapsed(**trial.fields, **fall, **kept)
        return outcome


def _function_of(arm: Arm) -> Literal["train", "evaluate"]:
    return "train" if arm.truncate_from is None else "evaluate"


def _write_truncated(folder: RunFolder, parent: str, trial: Trial) -> None:
    """Write the PEFT adapter of a trial, truncated by singular values, as that of another.

    Raises:
        InputError: no PEFT adapter there, or of a kind that can't be truncated.
    """
    from rightrank.adapters.resize import capped, write_resized
    from rightrank.models.adapter_files import open_adapter  # these bring torch, which a trainer may not need

    adapter, target = open_adapter(folder.trial_adapter(parent)), folder.trial_adapter(trial.trial_id)
    shutil.rmtree(target, ignore_errors=True)
    write_resized(adapter, target, capped(adapter, trial.arm.rank))


def outcome_of(trial: Trial, result: TrialResult, metric: str, seconds: float) -> TrialFinished:
    returned = dict(result) | {"train_seconds": seconds if result.train_seconds is None else result.train_seconds}
    return TrialFinished(**trial.fields, **returned, value=result.metrics[metric], item_losses=[], item_tokens=[])
