"""Selection with a custom trainer: the user's function trains, with any library."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from rightrank.data.files import report_disk_errors
from rightrank.decision.run import best_trial
from rightrank.decision.verdicts import DROP_IN_MARGINS
from rightrank.hooks.report import answers
from rightrank.runs.calls import (
    Call,
    CustomExecutor,
    EvaluateFunction,
    FolderEvaluation,
    Measure,
    TrainFunction,
    call_in_process,
    call_inline,
)
from rightrank.runs.finish import hand_over_saved
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import Hooks
from rightrank.runs.loop import LoopOptions, Selection
from rightrank.runs.plugins import calls, decide_rows
from rightrank.runs.returns import Selected
from rightrank.runs.start import open_selection
from rightrank.schema.decision import Decision
from rightrank.schema.errors import ResultsError, SettingsError
from rightrank.schema.events import DataSummary, RunStarted
from rightrank.schema.metrics import direction, unknown_direction
from rightrank.schema.settings import Goal, SelectSettings, make_settings, profile_named, with_identity_of
from rightrank.schema.trials import content_hash
from rightrank.search.space import space_of
from rightrank.search.strategies import make_strategy, strategy_in
from rightrank.search.upward import Upward
from rightrank.version import __version__

JudgementRows: TypeAlias = Iterable[Mapping[str, object]]
Judgements: TypeAlias = JudgementRows | str | Path | Callable[[Mapping[int, Path]], JudgementRows]


@dataclass(frozen=True, slots=True)
class CustomRequest:
    """A selection with a custom trainer, its arguments checked."""

    settings: SelectSettings
    steps: int
    metric: str
    higher_is_better: bool
    with_base: bool
    version: str
    report_to: tuple[str, ...]
    profile: str | None = None
    judgements: Judgements | None = None  # that decide in place of the metric
    judged_margin: float | None = None


@dataclass(frozen=True, slots=True)
class Trainer:
    """The function, how it is called, and how many calls run at a time."""

    train: TrainFunction
    call: Call
    workers: int
    evaluate: Call | None = None  # of an adapter in a task's folder; None: the first question is not asked


def select_custom(request: CustomRequest, trainer: Trainer, folder: RunFolder, hooks: Hooks) -> Selected:
    """Run the selection, and hand over what the trainer saved."""
    with folder.locked(), report_disk_errors(folder.path):
        started = _run_started(request, trainer.train, folder)
        space = replace(
            space_of(request.settings, request.steps),
            stages=False,
            evaluates_base=request.with_base,
            truncates=trainer.evaluate is not None,
            higher_is_better=request.higher_is_better,
        )
        strategy = strategy_in(request.settings.strategy, space)
        options = LoopOptions(request.settings.goal, "give another range of learning rates, and a new out")
        selection, trackers = open_selection(
            folder, started, request.steps, strategy, options, request.report_to, hooks
        )
        executor = CustomExecutor(
            trainer.call,
            Measure(request.metric, request.higher_is_better, collapse_drop(request)),
            selection.records.finished(),
            folder.trial_adapter,
            selection.listener,
            trainer.workers,
            trainer.evaluate,
        )
        decision = selection.run(executor)
        if request.judgements is not None and (decision is not None or request.settings.goal == "adapter"):
            decision = judged_decision(selection, decision, request.judgements, request.judged_margin)
        adapter = hand_over_saved(selection, decision)
        if decision is not None:
            trackers.decided(decision)
        found: dict[str, Any] = {}
        with selection.faults.kept("the answer"):
            found = answers(selection.records, decision, request.settings.goal)
        selection.faults.require_none(folder.path)
        selected = Selected(decision, folder.path, adapter, folder.report, found)
        hooks.on_end(selected)
        return selected


def judged_decision(
    selection: Selection, decision: Decision | None, judgements: Judgements, margin: float | None
) -> Decision:
    """The decision on judgements, with the trials of each rank's best learning rate as in the metric's decision.

    Raises:
        SettingsError: the goal is the adapter, which the metric decides.
        ResultsError: rows that can't be used, or that name a rank that was not trained.
    """
    if decision is None:
        raise SettingsError("judgements decide on the rank to train at: give goal 'training-rank'")
    records = selection.records
    ranks = [one.rank for one in decision.ranks if one.rank > 0]
    if callable(judgements):
        best = {rank: best_trial(records, decision, rank).trial_id for rank in ranks}
        judgements = list(judgements({rank: selection.folder.trial_adapter(trial) for rank, trial in best.items()}))
    decided = decide_rows(judgements, margin, ranks)
    if decided is None:
        raise ResultsError("judgements: no row has rank_a and rank_b; give prompt, rank_a, rank_b and outcome")
    judged, _ = decided
    own = {one.rank: one for one in decision.ranks}
    kept = [
        one.model_copy(update={"trial_ids": own[one.rank].trial_ids, "learning_rate": own[one.rank].learning_rate})
        for one in judged.ranks
    ]
    return judged.model_copy(update={"ranks": kept, "learning_rate": own[judged.fallback_rank].learning_rate})


def collapse_drop(request: CustomRequest) -> float | None:
    """The fall of the held-out value that counts as a collapse; None where the profile does not judge it."""
    margin = request.settings.margin
    if not profile_named(request.profile).judges_collapse or margin is None:
        return None
    return DROP_IN_MARGINS * margin


def make_trainer(
    train: TrainFunction,
    goal: Goal,
    where: str,
    timeout_seconds: float | None,
    workers: int,
    evaluate: EvaluateFunction | None,
) -> Trainer:
    """The trainer of a function, its arguments checked.

    Raises:
        SettingsError: an argument that is not allowed, or a function that can't be sent to a process.
    """
    if goal == "adapter" and evaluate is None:
        raise SettingsError(
            "goal 'adapter' needs evaluate=, a function of an adapter folder and a TrialTask that returns held-out scores; "
            "give it, or goal 'training-rank'"
        )
    if not callable(train):
        raise SettingsError(f"train: got a {type(train).__name__}; give a function of one TrialTask")
    if timeout_seconds is not None and (where != "process" or timeout_seconds <= 0):
        raise SettingsError('timeout_seconds needs where="process" and a number above 0: other calls can\'t be ended')
    elsewhere: dict[str, Callable[[TrainFunction], Call]] = calls()
    if where not in ("here", "threads", "process", *elsewhere):
        raise SettingsError(f'where: got {where!r}; give "here", "threads", "process" or "ray"')
    if workers < 1 or (workers > 1 and where == "here"):
        raise SettingsError(
            f'workers: got {workers} with where={where!r}; give 1, or more with "threads", "process" or "ray"'
        )
    if evaluate is not None and not callable(evaluate):
        raise SettingsError(
            f"evaluate: got a {type(evaluate).__name__}; give a function of an adapter folder and a TrialTask"
        )

    def call_of(function: TrainFunction) -> Call:
        if where in elsewhere:
            return elsewhere[where](function)
        return call_in_process(function, timeout_seconds) if where == "process" else call_inline(function)

    evaluation = None if evaluate is None else call_of(FolderEvaluation(evaluate))
    return Trainer(train, call_of(train), workers, evaluation)


def settings_of(values: dict[str, object], profile: str | None) -> SelectSettings:
    """The settings of a selection with a custom trainer; the profile gives those that are None.

    Raises:
        SettingsError: a value that is not allowed, an unknown strategy, or one that does not serve the goal.
    """
    defaults = profile_named(profile)
    own = {"seeds": defaults.seeds, "margin": defaults.margin, "strategy": defaults.strategy}
    settings = make_settings(values | {name: value for name, value in own.items() if values[name] is None})
    make_strategy(settings, 1)  # refuses an unknown name first
    if settings.goal == "adapter" and settings.strategy == Upward.name:
        raise SettingsError(
            f"goal 'adapter' needs an adapter of the largest rank, and strategy {Upward.name!r} climbs from the smallest; give "
            "goal 'training-rank', or another strategy"
        )
    return settings


def metric_of(metric: str | None, higher_is_better: bool | None, profile: str | None) -> tuple[str, bool]:
    """The metric, None for that of the profile, and whether higher is better, None for what its name implies.

    Raises:
        SettingsError: no direction was given, and the name implies none.
    """
    metric = profile_named(profile).metric if metric is None else metric
    higher = direction(metric) if higher_is_better is None else higher_is_better
    if higher is None:
        raise SettingsError(f"{unknown_direction(metric)}; pass higher_is_better=True or False")
    return metric, higher


def _run_started(request: CustomRequest, train: TrainFunction, folder: RunFolder) -> RunStarted:
    name = f"{getattr(train, '__module__', '?')}.{getattr(train, '__qualname__', type(train).__name__)}"
    kept = ("strategy", "ranks", "learning_rates", "seeds", "lora_alpha", "margin")
    values = {
        "model": None,
        "data": None,
        "trainer": name,
        "version": request.version,
        "steps": request.steps,
        "metric": request.metric,
        "higher_is_better": request.higher_is_better,
        **request.settings.model_dump(mode="json", include=set(kept)),
    }
    if request.profile is not None:
        values["profile"] = request.profile
    first = next(iter(folder.journal.read()), None)
    begun = first.settings if isinstance(first, RunStarted) else {}
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
