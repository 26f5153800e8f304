"""The trackers of a selection: each trial is written as a run when it ends, all in one group.

Each tracker keeps its own environment variables: `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, `WANDB_PROJECT`,
`WANDB_DIR`, `WANDB_MODE`, `WANDB_ENTITY`, `TRACKIO_DIR`, `TRACKIO_PROJECT`. Their own clients write, not accelerate's
trackers, which need a state of the process that starts a process group if `LOCAL_RANK` is set.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

from rightrank.runs.run import Hook, Run
from rightrank.schema.errors import MissingExtraError, SettingsError, format_one_line, suggest_name
from rightrank.schema.events import Event, Notice, RunStarted
from rightrank.schema.trials import OUTCOMES, TrialFinished, TrialOutcome

TrackedValue: TypeAlias = str | int | float | bool | None

TRACKERS = ("trackio", "wandb", "mlflow")  # each is also the name of its package
CLIENT_ERRORS = {
    "trackio": ("sqlite3", "Error"),
    "wandb": ("wandb", "Error"),
    "mlflow": ("mlflow.exceptions", "MlflowException"),
}
MAX_BATCH, MAX_TEXT = 100, 6000  # limits of MLflow: parameters per request, characters per parameter


def resolve_trackers(names: Sequence[str]) -> tuple[str, ...]:
    """Return the trackers that the names select, each once.

    Raises:
        SettingsError: an unknown tracker.
        MissingExtraError: a tracker that is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise SettingsError(
                f"report_to {name!r} is unknown{suggest_name(name, TRACKERS)}; allowed: {', '.join(TRACKERS)}"
            )
        if find_spec(name) is None:
            raise MissingExtraError(f"report_to {name!r} needs an extra: pip install 'rightrank[{name}]'")
    return tuple(dict.fromkeys(names))


class Trackers(Hook):
    """Writes every trial to every tracker when it ends.

    Raises:
        SettingsError, MissingExtraError: as `resolve_trackers`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(resolve_trackers(names))
        self._run: Run

    def on_start(self, run: Run) -> None:
        self._run = run

    def on_event(self, event: Event) -> None:
        if not self._names or not isinstance(event, OUTCOMES):
            return
        run = _convert_trial(self._run, event)
        for name in list(self._names):
            try:
                with redirect_stdout(sys.stderr):  # stdout is reserved for the result
                    _write_mlflow(run) if name == "mlflow" else _write_run(name, run)
            except _list_client_errors(name) as error:  # an unreachable tracker must not end the selection
                reason = format_one_line(str(error))[:200]
                self._run.on_event(Notice(text=f"{name}: logging stopped ({type(error).__name__}: {reason})"))
                self._names.remove(name)


def _list_client_errors(tracker: str) -> tuple[type[Exception], ...]:
    """Return what a tracker's client raises if its server or its database cannot be reached, or refuses the run."""
    module, name = CLIENT_ERRORS[tracker]
    client_error = getattr(
        sys.modules.get(module), name, None
    )  # None: the client was not imported, so it raises nothing
    return (OSError,) if client_error is None else (OSError, client_error)


@dataclass(frozen=True, slots=True)
class _TrackedRun:
    """A trial as a run of a tracker: its configuration, and its numbers by step."""

    name: str
    group: str
    config: Mapping[str, TrackedValue]
    steps: Mapping[int, Mapping[str, float]]  # step → name → number


def _write_run(tracker: str, run: _TrackedRun) -> None:
    """Write a run in a group with the interface that wandb and trackio share.

    Without a mode or a key, wandb would ask and wait, so it is offline then; `wandb sync` uploads the runs later.
    """
    library: Any = import_module(tracker)
    options: dict[str, Any] = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}  # no dashboard is opened
    if tracker == "wandb":
        is_configured = "WANDB_MODE" in os.environ or library.login(prompt=False)
        settings = {"silent": True, "console": "off", "x_disable_stats": True}
        options = {"mode": None if is_configured else "offline", "reinit": "finish_previous", "settings": settings}
    opened = library.init(
        project=os.environ.get(f"{tracker.upper()}_PROJECT", "rightrank"),
        group=run.group,
        name=f"{run.group}/{run.name}",
        config=dict(run.config),
        **options,
    )
    for step, values in run.steps.items():
        opened.log(dict(values), step=step)
    opened.finish()


def _write_mlflow(run: _TrackedRun) -> None:
    """Write a run with a tag for its group. An active run of this process stays unchanged."""
    import mlflow
    from mlflow.entities import Metric, Param

    client, experiment = mlflow.MlflowClient(), os.environ.get("MLFLOW_EXPERIMENT_NAME", "rightrank")
    existing = client.get_experiment_by_name(experiment)
    experiment_id = client.create_experiment(experiment) if existing is None else existing.experiment_id
    key = client.create_run(experiment_id, run_name=run.name, tags={"rightrank.group": run.group}).info.run_id
    now = int(time.time() * 1000)
    metrics = [
        Metric(name, float(value), now, step) for step, values in run.steps.items() for name, value in values.items()
    ]
    params = [Param(name, str(value)[:MAX_TEXT]) for name, value in run.config.items() if value is not None]
    for start in range(0, max(len(metrics), len(params)), MAX_BATCH):
        batch = slice(start, start + MAX_BATCH)
        client.log_batch(key, metrics=metrics[batch], params=params[batch])
    client.set_terminated(key)


def _convert_trial(run: Run, outcome: TrialOutcome) -> _TrackedRun:
    """Convert a trial to a run in the group of its selection."""
    started, arm, steps = run.selection.started, outcome.arm, run.selection.steps
    config: dict[str, TrackedValue] = {
        "lora_r": arm.rank,
        "learning_rate": arm.learning_rate,
        "seed": arm.seed,
        "lora_alpha": arm.lora_alpha,
        "steps": arm.steps,
        "stage": arm.format_stage() or ("longer" if 0 < steps < arm.steps else "whole"),
        "outcome": outcome.type.removeprefix("trial_"),
    }
    config |= {f"settings/{name}": _convert_value(value) for name, value in started.settings.items()}
    return _TrackedRun(
        name=f"r{arm.rank}-lr{arm.learning_rate:g}-seed{arm.seed}-{outcome.trial_id[:6]}",
        group=f"{run.folder.path.resolve().name}-{started.fingerprint[:6]}",
        config=config if isinstance(outcome, TrialFinished) else config | {"reason": outcome.reason},
        steps=_collect_steps(started, outcome) if isinstance(outcome, TrialFinished) else {},
    )


def _convert_value(value: object) -> TrackedValue:
    """Return the value itself if every tracker can hold it, else JSON."""
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value)


def _collect_steps(started: RunStarted, trial: TrialFinished) -> dict[int, dict[str, float]]:
    """Collect by step the losses and evaluations of a training, and at its end the metrics and the cost."""
    points_metric = started.points_metric or started.metric
    numbers: dict[int, dict[str, float]] = {}
    for step, loss in enumerate(trial.train_losses, start=1):
        numbers.setdefault(step, {})["train/loss"] = loss
    for point in trial.points:
        numbers.setdefault(point.step, {})[f"eval/{points_metric}"] = point.value
    last = numbers.setdefault(trial.end, {})
    last |= {f"eval/{metric}": value for metric, value in trial.metrics.items()}
    for name in ("train_seconds", "eval_seconds", "trainable_parameters", "peak_bytes"):
        last[name] = getattr(trial, name)
    return dict(sorted(numbers.items()))
