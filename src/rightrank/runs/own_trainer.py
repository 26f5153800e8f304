"""Selection with a custom trainer: the user's function trains, with any library."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TypedDict

from rightrank.decision.collapse import DROP_IN_MARGINS
from rightrank.runs.calls import (
    Call,
    CustomExecutor,
    EvaluateFunction,
    Measure,
    TrainFunction,
    call_in_process,
    call_inline,
)
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import Hooks, Run
from rightrank.runs.plugins import calls
from rightrank.schema.errors import SettingsError, did_you_mean
from rightrank.schema.events import DataSummary, JournalRecord, RunStarted
from rightrank.schema.metrics import direction, unknown_direction
from rightrank.schema.settings import (
    Goal,
    Profile,
    ProfileName,
    SelectSettings,
    make_settings,
    profile_named,
    with_identity_of,
)
from rightrank.schema.trials import TrialResult, TrialTask, content_hash
from rightrank.search.history import space_of
from rightrank.search.strategies import make_strategy, strategy_in
from rightrank.search.upward import REASONER_START, Upward, is_distilled_reasoner
from rightrank.version import __version__


class TrainerSettings(TypedDict, total=False):
    """What `select_rank_with` takes beside its own parameters."""

    goal: Goal
    """"adapter" stops at the smallest adapter and needs `evaluate`; "training-rank" continues to the rank to train at."""
    profile: ProfileName | None
    """"rl" for reinforcement learning: strategy "upward", metric "reward", seeds 0, 1 and 2, a margin of 0.02 where none is given; a
    training whose held-out value falls far below its own best has collapsed and has no result; the smallest rank is the answer
    where no difference between ranks can be shown."""
    strategy: str | None
    """None for "grid", or that of the profile."""
    lora_alpha: float
    max_steps: int
    """Passed to `train` in the task, as `steps`; 0 leaves the length to it."""
    higher_is_better: bool | None
    """None for that of a metric with a known name (`accuracy`, `f1`, `reward`, `loss`, …); any other metric needs it."""
    with_base: bool
    """Also call `train` with rank 0, to evaluate the base without training."""
    workers: int
    """Concurrent calls; above 1 only with executor "threads", "processes" or "ray"."""
    timeout_seconds: float | None
    """End a training that takes longer; needs executor "processes"."""
    version: str
    """Change this when `train` changes, so that old trials are not reused."""
    report_to: Sequence[str]
    """Trackers that log every trial: trackio, wandb, mlflow, tensorboard."""
    progress: bool
    """Show the progress on stderr, or in the output of a notebook's cell."""


@dataclass(frozen=True, slots=True)
class OwnRequest:
    """A selection with a custom trainer, its arguments checked."""

    settings: SelectSettings
    metric: str
    higher_is_better: bool
    train: TrainFunction
    call: Call
    evaluate: Call | None  # of an adapter in a task's folder; None: the first question is not asked
    given: TrainerSettings

    @property
    def steps(self) -> int:
        return self.given.get("max_steps", 0)

    @property
    def collapse_drop(self) -> float | None:
        """The fall of the held-out value that counts as a collapse; None where the profile does not judge it."""
        margin = self.settings.margin
        judges = profile_named(self.given.get("profile")).judges_collapse
        return DROP_IN_MARGINS * margin if judges and margin is not None else None


def own_request(
    train: TrainFunction,
    evaluate: EvaluateFunction | None,
    executor: str,
    metric: str | None,
    compared: Mapping[str, object],
    given: TrainerSettings,
) -> OwnRequest:
    """Check the arguments; the profile gives what is None.

    Args:
        compared: ranks, learning_rates, seeds and margin.

    Raises:
        SettingsError: an argument that is not allowed, a metric without a known direction, or a function that can't be sent to
            a process.
    """
    for name in given:
        if name not in TrainerSettings.__annotations__:
            allowed = TrainerSettings.__annotations__
            raise SettingsError(f"{name} is no setting{did_you_mean(name, allowed)}; there are: {', '.join(allowed)}")
    profile = profile_named(given.get("profile"))
    settings = _settings(profile, compared, given)
    metric = _metric_of(train, metric) or profile.metric
    own, higher = getattr(train, "higher_is_better", None), given.get("higher_is_better")
    if higher is None:
        higher = own if isinstance(own, bool) else direction(metric)
    if higher is None:
        raise SettingsError(f"{unknown_direction(metric)}; pass higher_is_better=True or False")
    _require_functions(train, evaluate, settings.goal)
    call_of = _caller(executor, given.get("workers", 1), given.get("timeout_seconds"))
    evaluation = None if evaluate is None else call_of(partial(_of_folder, evaluate))
    return OwnRequest(settings, metric, higher, train, call_of(train), evaluation, given)


def _of_folder(evaluate: EvaluateFunction, task: TrialTask) -> Mapping[str, float] | TrialResult:
    """What `evaluate` says of the adapter in the task's folder."""
    return evaluate(task.folder, task)


def open_own_run(request: OwnRequest, folder: RunFolder, hooks: Hooks) -> Run:
    """A run whose trials the user's function trains; the journal is read, and nothing is written."""
    journal = folder.journal.read(hooks.notice)
    model = getattr(request.train, "model", None)  # of the ready functions for TRL
    space = replace(
        space_of(request.settings, request.steps),
        stages=False,
        evaluates_base=request.given.get("with_base", False),
        truncates=request.evaluate is not None,
        higher_is_better=request.higher_is_better,
        start_rank=REASONER_START if isinstance(model, str) and is_distilled_reasoner(model) else 0,
    )
    return Run(
        folder,
        hooks,
        _run_started(request, journal),
        request.settings,
        request.steps,
        strategy_in(request.settings.strategy, space),
        lambda run: nullcontext(_executor(request, run)),
        journal,
        advice="give another range of learning rates, and a new out",
    )


def _metric_of(train: object, given: str | None) -> str | None:
    """The metric that is given, or the one that a ready function names itself (`train.metric`).

    Raises:
        SettingsError: another one is given: the function's scores by example are those of its own.
    """
    own = getattr(train, "metric", None)
    if not isinstance(own, str):
        return given
    if given not in (None, own):
        name, decides = type(train).__name__, " decides_by=…" if hasattr(train, "decides_by") else " another train"
        raise SettingsError(
            f"metric {given!r}: {name} scores the examples by {own!r}; leave metric out, or give{decides}"
        )
    return own


def _executor(request: OwnRequest, run: Run) -> CustomExecutor:
    return CustomExecutor(
        request.call,
        Measure(request.metric, request.higher_is_better, request.collapse_drop),
        run.records.finished(),
        run.folder.trial_adapter,
        run,
        request.given.get("workers", 1),
        request.evaluate,
    )


def _settings(profile: Profile, compared: Mapping[str, object], given: TrainerSettings) -> SelectSettings:
    values = {**compared, "strategy": given.get("strategy") or None}
    values |= {name: getattr(profile, name) for name in ("seeds", "margin", "strategy") if values[name] is None}
    goal, alpha = given.get("goal", "training-rank"), given.get("lora_alpha", 32.0)
    settings = make_settings(values | {"goal": goal, "lora_alpha": alpha})
    make_strategy(settings, 1)  # refuses an unknown name first
    if settings.goal == "adapter" and settings.strategy == Upward.name:
        raise SettingsError(
            f"goal 'adapter' needs an adapter of the largest rank, and strategy {Upward.name!r} climbs from the smallest; give "
            "goal 'training-rank', or another strategy"
        )
    return settings


def _require_functions(train: object, evaluate: object, goal: Goal) -> None:
    if goal == "adapter" and evaluate is None:
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


def _caller(executor: str, workers: int, timeout_seconds: float | None) -> Callable[[TrainFunction], Call]:
    """How a function is called by the executor of that name."""
    if timeout_seconds is not None and (executor != "processes" or timeout_seconds <= 0):
        raise SettingsError(
            'timeout_seconds needs executor="processes" and a number above 0: other calls can\'t be ended'
        )
    elsewhere: dict[str, Callable[[TrainFunction], Call]] = calls()
    if executor not in ("local", "threads", "processes", *elsewhere):
        raise SettingsError(f'executor: got {executor!r}; give "local", "threads", "processes" or "ray"')
    if workers < 1 or (workers > 1 and executor == "local"):
        raise SettingsError(
            f'workers: got {workers} with executor={executor!r}; give 1, or more with "threads", "processes" or "ray"'
        )
    if executor in elsewhere:
        return elsewhere[executor]
    if executor == "processes":
        return lambda function: call_in_process(function, timeout_seconds)
    return call_inline


def _run_started(request: OwnRequest, journal: Sequence[JournalRecord]) -> RunStarted:
    train, profile = request.train, request.given.get("profile")
    name = f"{getattr(train, '__module__', '?')}.{getattr(train, '__qualname__', type(train).__name__)}"
    values = {
        "model": None,
        "data": None,
        "trainer": name,
        "version": request.given.get("version", ""),
        "steps": request.steps,
        "metric": request.metric,
        "higher_is_better": request.higher_is_better,
        **request.settings.model_dump(mode="json", include=request.settings.model_fields_set - {"goal"}),
    }
    if profile is not None:
        values["profile"] = profile
    begun = journal[0].settings if journal and isinstance(journal[0], RunStarted) else {}
    return RunStarted(
        rightrank_version=__version__,
        fingerprint=content_hash({"settings": with_identity_of(values, begun)}),
        settings=values,
        environment={
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "device": "the trainer's own",
        },
        data=DataSummary(form="own", splits={}, splits_given=False, duplicates_across_splits=0),
        evaluation_items=[],
        metric=request.metric,
        higher_is_better=request.higher_is_better,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
