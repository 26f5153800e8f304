"""The trackers of a selection. Each logs every trial, and the decision, as a run once, however often the selection is resumed.

Each tracker keeps its own environment variables: `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, `WANDB_PROJECT`,
`WANDB_DIR`, `WANDB_MODE`, `WANDB_ENTITY`, `TRACKIO_DIR`, `TRACKIO_PROJECT`. Their own clients write, not accelerate's
trackers: those need a state of the whole process, which starts a process group where `LOCAL_RANK` is set.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from rightrank.data.files import write_text
from rightrank.runs.hook import Hook, Started
from rightrank.schema.decision import Decision
from rightrank.schema.errors import MissingExtraError, SettingsError, did_you_mean, one_line
from rightrank.schema.events import DecisionRecorded, Event, Notice, RunStarted, SelectionPlanned
from rightrank.schema.trials import OUTCOMES, TrialFinished, TrialOutcome

Plain: TypeAlias = str | int | float | bool | None

TRACKERS = ("trackio", "wandb", "mlflow", "tensorboard")  # each is the name of its package too
LOGGED_FILE = "tracked.json"
MAX_BATCH, MAX_TEXT = 100, 6000  # of MLflow: parameters in a request, characters of one


def require_trackers(names: Sequence[str]) -> tuple[str, ...]:
    """The trackers that the names stand for. As in transformers, `all` means the installed ones and `none` means none.

    Raises:
        SettingsError: an unknown tracker.
        MissingExtraError: a tracker that is not installed.
    """
    if tuple(names) == ("none",):
        return ()
    if tuple(names) == ("all",):
        return tuple(name for name in TRACKERS if find_spec(name) is not None)
    for name in names:
        if name not in TRACKERS:
            raise SettingsError(
                f"report_to {name!r} is not known{did_you_mean(name, TRACKERS)}; allowed: {', '.join(TRACKERS)}, all, none"
            )
        if find_spec(name) is None:
            raise MissingExtraError(f"report_to {name!r} needs an extra: pip install 'rightrank[{name}]'")
    return tuple(dict.fromkeys(names))


class Trackers(Hook):
    """Logs every trial that ended, and the decision, to every tracker that does not have it yet.

    Raises:
        SettingsError, MissingExtraError: as `require_trackers`.
    """

    ends_run = False

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self._folder = folder
        self._names = list(require_trackers(names))
        self._logged: dict[str, list[str]] = {}
        self._started: Started

    def on_start(self, started: Started) -> None:
        self._started = started
        self._logged = self._read()

    def on_event(self, event: Event) -> None:
        if not self._names:
            return
        started = self._started.plan.started
        group = f"{self._folder.resolve().name}-{started.fingerprint[:6]}"
        if isinstance(event, SelectionPlanned):  # what an interrupted run did not log
            for outcome in event.outcomes:
                self._log(_tracked_trial(started, outcome, group))
        elif isinstance(event, OUTCOMES):
            self._log(_tracked_trial(started, event, group))
        elif isinstance(event, DecisionRecorded):
            self._log(_tracked_decision(started, event.decision, group))

    def _log(self, run: _TrackedRun) -> None:
        for name in list(self._names):
            logged = self._logged.setdefault(name, [])
            if run.key in logged:
                continue
            try:
                with redirect_stdout(sys.stderr):  # stdout is reserved for the answer
                    _WRITERS[name](run, self._folder)
            except Exception as error:  # noqa: BLE001 - an unreachable tracker must not end the selection
                reason = one_line(str(error))[:200]
                text = (
                    f"{name}: logging stopped ({type(error).__name__}: {reason}); run again to log the missing trials"
                )
                self._started.tell(Notice(text=text))
                self._names.remove(name)
                continue
            logged.append(run.key)
            write_text(self._folder / LOGGED_FILE, json.dumps(self._logged) + "\n")

    def _read(self) -> dict[str, list[str]]:
        """The keys of the runs that each tracker has; empty if unknown."""
        try:
            logged = json.loads((self._folder / LOGGED_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return logged if isinstance(logged, dict) and all(isinstance(keys, list) for keys in logged.values()) else {}


@dataclass(frozen=True, slots=True)
class _TrackedRun:
    """A trial, or the decision: its configuration, its numbers by step, and the words of its end."""

    key: str  # the trial's identity
    name: str  # readable, and valid as a folder name
    group: str
    config: Mapping[str, Plain]
    steps: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # step → name → number
    summary: Mapping[str, Plain] = field(default_factory=dict)
    failed: bool = False


def _tensorboard(run: _TrackedRun, folder: Path) -> None:
    """A folder of event files in `tensorboard/` of the run folder; configuration and summary are texts."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard" / run.name)) as writer:
        for step, values in run.steps.items():
            for name, value in values.items():
                writer.add_scalar(name, value, step)
        for name, texts in (("config", run.config), ("summary", run.summary)):
            writer.add_text(name, f"```json\n{json.dumps(dict(texts), indent=1)}\n```")


def _mlflow(run: _TrackedRun, _folder: Path) -> None:
    """A run with tags for group, trial and summary. An active run of this process is left alone."""
    import mlflow
    from mlflow.entities import Metric, Param, RunTag

    client, experiment = mlflow.MlflowClient(), os.environ.get("MLFLOW_EXPERIMENT_NAME", "rightrank")
    existing = client.get_experiment_by_name(experiment)
    place = client.create_experiment(experiment) if existing is None else existing.experiment_id
    tags = {"rightrank.group": run.group, "rightrank.trial_id": run.key}
    key = client.create_run(place, run_name=run.name, tags=tags).info.run_id
    now = int(time.time() * 1000)
    metrics = [
        Metric(name, float(value), now, step) for step, values in run.steps.items() for name, value in values.items()
    ]
    params = [Param(name, str(value)[:MAX_TEXT]) for name, value in run.config.items() if value is not None]
    for start in range(0, max(len(metrics), len(params)), MAX_BATCH):
        part = slice(start, start + MAX_BATCH)
        client.log_batch(key, metrics=metrics[part], params=params[part])
    client.log_batch(key, tags=[RunTag(name, str(value)[:MAX_TEXT]) for name, value in run.summary.items()])
    client.set_terminated(key, "FAILED" if run.failed else "FINISHED")


def _wandb(run: _TrackedRun, _folder: Path) -> None:
    """A run in a group. Without a mode or a key it is offline, and `wandb sync` uploads it later: wandb would ask and wait."""
    import wandb

    known = "WANDB_MODE" in os.environ or wandb.login(prompt=False)
    with wandb.init(
        project=os.environ.get("WANDB_PROJECT", "rightrank"),
        group=run.group,
        id=f"{run.group}-{run.key}",
        name=run.name,
        config=dict(run.config),
        mode=None if known else "offline",
        reinit="finish_previous",
        resume="allow",
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
    ) as opened:
        for step, values in run.steps.items():
            opened.log(dict(values), step=step)
        opened.summary.update(dict(run.summary))
        if run.failed:
            opened.finish(exit_code=1)


def _trackio(run: _TrackedRun, _folder: Path) -> None:
    """A run in the local store, in a group; no dashboard is opened."""
    import trackio

    opened = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", "rightrank"),
        name=f"{run.group}/{run.name}",
        group=run.group,
        config=dict(run.config) | {f"summary/{name}": value for name, value in run.summary.items()},
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    for step, values in run.steps.items():
        opened.log(dict(values), step=step)
    opened.finish()


def _tracked_trial(started: RunStarted, outcome: TrialOutcome, group: str) -> _TrackedRun:
    """The trial as a run.

    A training that was stopped early, or truncated is no point of the curve. Its rank is logged
    as `stage_rank` and its values as `stage/…`, which keeps them apart from the others in the tracker's charts.
    """
    arm = outcome.arm
    whole = arm.is_direct
    config: dict[str, Plain] = {
        "lora_r" if whole else "stage_rank": arm.rank,
        "learning_rate": arm.learning_rate,
        "seed": arm.seed,
        "lora_alpha": arm.lora_alpha,
        "steps": arm.steps,
        "stage": arm.stage() or "whole",
    }
    config |= {f"settings/{name}": _plain(value) for name, value in started.settings.items()}
    name = f"r{arm.rank}-lr{arm.learning_rate:g}-seed{arm.seed}-{outcome.trial_id[:6]}"
    if not isinstance(outcome, TrialFinished):
        summary = {"outcome": outcome.type, "reason": outcome.reason}
        return _TrackedRun(outcome.trial_id, name, group, config, summary=summary, failed=True)
    name = name if whole else f"stage-{outcome.trial_id}"
    steps = _steps(started, outcome, "eval" if whole else "stage")
    return _TrackedRun(outcome.trial_id, name, group, config, steps, {"outcome": outcome.type})


def _tracked_decision(started: RunStarted, decision: Decision, group: str) -> _TrackedRun:
    """The decision as the last run of the group."""
    summary: dict[str, Plain] = {
        f"decision/{name}": _plain(value)
        for name, value in decision.model_dump(mode="json").items()
        if name not in ("staircase", "next_runs", "other_metrics")
    }
    config = {f"settings/{name}": _plain(value) for name, value in started.settings.items()}
    return _TrackedRun("decision", "decision", group, config, summary=summary)


def _plain(value: object) -> Plain:
    """The value itself if every tracker can hold it, else JSON."""
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value)


def _steps(started: RunStarted, trial: TrialFinished, prefix: str) -> dict[int, dict[str, float]]:
    """The losses of a training by step, its looks, and at its end the metrics and the cost."""
    along = started.points_metric or started.metric
    numbers: dict[int, dict[str, float]] = {}
    for step, loss in enumerate(trial.train_losses, start=1):
        numbers.setdefault(step, {})["train/loss"] = loss
    for point in trial.points:
        numbers.setdefault(point.step, {})[f"{prefix}/{along}"] = point.value
    last = numbers.setdefault(trial.end, {})
    last |= {f"{prefix}/{metric}": value for metric, value in trial.metrics.items()}
    for name in ("train_seconds", "eval_seconds", "trainable_parameters", "peak_bytes"):
        last[name] = getattr(trial, name)
    return dict(sorted(numbers.items()))


_WRITERS = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb, "trackio": _trackio}
