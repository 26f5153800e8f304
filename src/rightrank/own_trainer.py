"""`select_rank_with`: the same selection with a trainer of one's own, whatever it trains and with whatever library."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from rightrank.api import Selected, Watching, opened
from rightrank.decision.metrics import direction
from rightrank.errors import SettingsError
from rightrank.executors.custom import Call, CustomExecutor, TrainFunction, call_in_process, call_inline, call_on_ray
from rightrank.io.files import report_disk_errors
from rightrank.io.run_folder import RunFolder
from rightrank.records import DataSummary, RunStarted, TrialFinished, content_hash
from rightrank.settings import SelectSettings, make_settings
from rightrank.strategies import make_strategy, space_of, strategy_in
from rightrank.trackers import require_trackers
from rightrank.version import __version__

DIRECT_STRATEGIES = ("grid", "bracket", "ladder", "ascend")  # those that whole trainings are enough for


def select_rank_with(
    train: TrainFunction,
    out: str | Path,
    *,
    ranks: Sequence[int] = (1, 4, 16, 64),
    learning_rates: Sequence[float] = (3e-4, 1e-3, 3e-3),
    seeds: Sequence[int] = (0,),
    lora_alpha: float = 32.0,
    steps: int = 0,
    metric: str = "loss",
    higher_is_better: bool | None = None,
    margin: float | None = None,
    strategy: str = "grid",
    with_base: bool = False,
    where: Literal["here", "process", "ray"] = "here",
    workers: int = 1,
    timeout_seconds: float | None = None,
    version: str = "",
    report_to: Sequence[str] = (),
    watching: Watching | None = None,
) -> Selected:
    """Find the rank with a function that trains: DPO, RL, diffusion, vision, a script of one's own.

    Args:
        train: called with a `TrialTask`; gives back a mapping of held-out metrics or a `TrialResult`. With
            `item_scores` in it, the same items in every trial, ranks are compared pair by pair and far smaller
            differences are seen. It must train from `task.seed` alone, so that ranks differ in nothing else.
        out: the run folder. Called again with the same arguments it resumes; trials that failed are run again.
        steps: handed to `train` as they are; 0 leaves the length to it.
        metric: the name of the metric that decides.
        higher_is_better: None: by the metric's name (true of accuracy, f1 or reward, false of a loss or an error);
            required where the name does not say.
        margin: how much worse than the best is still enough; None: by the metric.
        with_base: call `train` with rank 0 too, to evaluate the base without training.
        where: "here", or each call in a fresh process of its own, on this machine ("process") or on a Ray cluster ("ray":
            the one that RAY_ADDRESS names, or one on this machine; `out` must be on a disk that its nodes share).
        workers: calls at a time; above 1 not "here".
        timeout_seconds: end a training that takes longer; needs `where="process"`.
        version: say something new here when `train` changes, so that old trials are not taken for its own.
        report_to: trackers that are told of every trial: trackio, wandb, mlflow, tensorboard.

    Raises:
        SettingsError: an argument that is not allowed, a metric whose direction is not known, or a function that can't
            be sent to a process.
        MissingExtraError: a tracker that is not installed.
        RunFolderError: a folder made with other settings.
        AllTrialsFailedError: no two ranks ended with a result.
        InterruptedRun: `watching.should_stop` said so.
    """
    asked = _Asked(
        settings=_checked(ranks, learning_rates, seeds, lora_alpha, margin, strategy),
        steps=steps,
        metric=metric,
        higher_is_better=_direction_of(metric, higher_is_better),
        with_base=with_base,
        version=version,
        report_to=require_trackers(report_to),
    )
    trainer = _Trainer(train, _call_of(train, where, timeout_seconds, workers), workers)
    return _select(asked, trainer, RunFolder(Path(out)), watching or Watching())


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the selection is asked, checked."""

    settings: SelectSettings
    steps: int
    metric: str
    higher_is_better: bool
    with_base: bool
    version: str
    report_to: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Trainer:
    """The function, the way in which it is called, and how many calls are under way at a time."""

    train: TrainFunction
    call: Call
    workers: int


def _select(asked: _Asked, trainer: _Trainer, folder: RunFolder, watching: Watching) -> Selected:
    from rightrank.handover import hand_over_saved  # brings torch, as the loop does
    from rightrank.selection import Terms

    started = _run_started(asked, trainer.train)
    with folder.locked(), report_disk_errors(folder.path):
        space = replace(
            space_of(asked.settings, asked.steps, token_loss=False),
            stages=False,
            higher_is_better=asked.higher_is_better,
        )
        strategy = strategy_in(asked.settings.strategy, space)
        terms = Terms(asked.with_base, "give another range of learning rates, and a new out")
        selection, trackers = opened(folder, started, asked.steps, strategy, terms, asked.report_to, watching)
        executor = CustomExecutor(
            trainer.call,
            asked.metric,
            _items(selection.records.finished()),
            folder.trial_adapter,
            selection.note_start,
            watching.should_stop,
            trainer.workers,
        )
        decision = selection.run(executor)
        adapter = hand_over_saved(selection, decision)
        trackers.decided(decision)
        return Selected(decision, folder.path, adapter, folder.report)


def _items(finished: Sequence[TrialFinished]) -> int | None:
    """How many held-out items the trials so far have scored."""
    return next((len(trial.item_scores) for trial in finished if trial.item_scores), None)


def _call_of(train: TrainFunction, where: str, timeout_seconds: float | None, workers: int) -> Call:
    """The way in which `train` is called, its arguments checked."""
    if not callable(train):
        raise SettingsError(f"train: got a {type(train).__name__}; give a function of one TrialTask")
    if timeout_seconds is not None and (where != "process" or timeout_seconds <= 0):
        raise SettingsError('timeout_seconds needs where="process" and a number above 0: other calls can\'t be ended')
    if where not in ("here", "process", "ray"):
        raise SettingsError(f'where: got {where!r}; give "here", "process" or "ray"')
    if workers < 1 or (workers > 1 and where == "here"):
        raise SettingsError(f'workers: got {workers} with where={where!r}; give 1, or more with "process" or "ray"')
    if where == "ray":
        return call_on_ray(train)
    return call_inline(train) if where == "here" else call_in_process(train, timeout_seconds)


def _checked(
    ranks: Sequence[int],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    lora_alpha: float,
    margin: float | None,
    strategy: str,
) -> SelectSettings:
    settings = make_settings(
        {
            "ranks": tuple(ranks),
            "learning_rates": tuple(learning_rates),
            "seeds": tuple(seeds),
            "lora_alpha": lora_alpha,
            "margin": margin,
            "strategy": strategy,
        }
    )
    make_strategy(settings, 1)  # an unknown name is told first
    if strategy not in DIRECT_STRATEGIES:
        raise SettingsError(
            f"strategy {strategy!r} cuts adapters to lower ranks and goes on with them, which a trainer of one's own "
            f"can't; give {', '.join(DIRECT_STRATEGIES)}"
        )
    return settings


def _run_started(asked: _Asked, train: TrainFunction) -> RunStarted:
    name = f"{getattr(train, '__module__', '?')}.{getattr(train, '__qualname__', type(train).__name__)}"
    kept = ("strategy", "ranks", "learning_rates", "seeds", "lora_alpha", "margin")
    values = {
        "model": None,
        "data": None,
        "trainer": name,
        "version": asked.version,
        "steps": asked.steps,
        "metric": asked.metric,
        "higher_is_better": asked.higher_is_better,
        **asked.settings.model_dump(mode="json", include=set(kept)),
    }
    return RunStarted(
        rightrank_version=__version__,
        fingerprint=content_hash({"settings": values}),
        settings=values,
        environment={
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "device": "the trainer's own",
        },
        data=DataSummary(form="own", splits={}, splits_given=False, duplicates_across_splits=0),
        evaluation_items=[],
        metric=asked.metric,
        higher_is_better=asked.higher_is_better,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _direction_of(metric: str, higher_is_better: bool | None) -> bool:
    higher = direction(metric) if higher_is_better is None else higher_is_better
    if higher is None:
        raise SettingsError(f"metric {metric!r}: pass higher_is_better=True or False, as the name does not say which")
    return higher
