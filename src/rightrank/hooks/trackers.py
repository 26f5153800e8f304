"""The trackers of a selection. Each logs every trial once, however often the selection is resumed.

Each tracker keeps its own environment variables: `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, `WANDB_PROJECT`,
`WANDB_DIR`, `WANDB_MODE`, `WANDB_ENTITY`, `TRACKIO_DIR`, `TRACKIO_PROJECT`. Their own clients write, not accelerate's
trackers: those need a state of the whole process, which starts a process group where `LOCAL_RANK` is set.

A trial, or the decision, as one run of a tracker: its configuration, its numbers by step and by example, its summary.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from rightrank.data.files import write_text
from rightrank.runs.hook import Hook, Run
from rightrank.schema.decision import Decision
from rightrank.schema.errors import MissingExtraError, SettingsError, did_you_mean
from rightrank.schema.events import DecisionRecorded, Event, RunStarted, SelectionPlanned
from rightrank.schema.trials import OUTCOMES, TrialFinished, TrialOutcome

TRACKERS = ("trackio", "wandb", "mlflow", "tensorboard")  # each is the name of its package too
LOGGED_FILE = "tracked.json"
MAX_PARAMS, MAX_TEXT = 100, 6000  # of MLflow: parameters in a request, characters of one


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
        self._run: Run | None = None

    def on_prepared(self, run: Run) -> None:
        self._run = run
        self._logged = self._read()

    def on_event(self, event: Event) -> None:
        if self._run is None or not self._names:
            return
        started = self._run.started
        group = f"{self._folder.resolve().name}-{started.fingerprint[:6]}"
        if isinstance(event, SelectionPlanned):  # what an interrupted run did not log
            for outcome in event.outcomes:
                self._log(_tracked_trial(started, outcome, group))
        elif isinstance(event, OUTCOMES):
            self._log(_tracked_trial(started, event, group))
        elif isinstance(event, DecisionRecorded):
            self._log(_tracked_decision(started, event.decision, group))

    def _log(self, run: TrackedRun) -> None:
        assert self._run is not None
        for name in list(self._names):
            logged = self._logged.setdefault(name, [])
            if run.key in logged:
                continue
            try:
                with redirect_stdout(sys.stderr):  # stdout is reserved for the answer
                    write_run(name, run, self._folder)
            except Exception as error:  # noqa: BLE001 - an unreachable tracker must not end the selection
                reason = " ".join(str(error).split())[:200]
                self._run.notice(
                    f"{name}: logging stopped ({type(error).__name__}: {reason}); run again to log the missing trials"
                )
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


def write_run(name: str, run: TrackedRun, folder: Path) -> None:
    """Write one trial or the decision, as a whole, to the tracker `name`."""
    {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb, "trackio": _trackio}[name](run, folder)


def _tensorboard(run: TrackedRun, folder: Path) -> None:
    """A folder of event files in `tensorboard/` of the run folder; configuration and summary are texts."""
    from torch.utils.tensorboard import SummaryWriter

    last = max(run.steps, default=0)
    with SummaryWriter(str(folder / "tensorboard" / run.name)) as writer:
        for step, name, value in run.points():
            writer.add_scalar(name, value, step)
        for name, values in (("config", run.config), ("summary", run.summary)):
            writer.add_text(name, f"```json\n{json.dumps(dict(values), indent=1)}\n```", last)


def _mlflow(run: TrackedRun, _folder: Path) -> None:
    """A run with tags for group, trial and the texts of its summary. An active run of this process is left alone."""
    import mlflow
    from mlflow.entities import Metric, Param, RunTag

    client, experiment = mlflow.MlflowClient(), os.environ.get("MLFLOW_EXPERIMENT_NAME", "rightrank")
    found = client.get_experiment_by_name(experiment)
    place = client.create_experiment(experiment) if found is None else found.experiment_id
    tags = {"rightrank.group": run.group, "rightrank.trial_id": run.key}
    key = client.create_run(place, run_name=run.name, tags=tags).info.run_id
    now, logged = int(time.time() * 1000), [*run.points(), *run.last_points()]
    metrics = [Metric(name, float(value), now, step) for step, name, value in logged]
    params = [Param(name, str(value)[:MAX_TEXT]) for name, value in run.config.items() if value is not None]
    texts = [RunTag(name, str(value)[:MAX_TEXT]) for name, value in run.texts().items()]
    for start in range(0, max(len(metrics), len(params)), MAX_PARAMS):
        part = slice(start, start + MAX_PARAMS)
        client.log_batch(key, metrics=metrics[part], params=params[part])
    client.log_batch(key, tags=texts)
    client.set_terminated(key, "FAILED" if run.failed else "FINISHED")


def _wandb(run: TrackedRun, _folder: Path) -> None:
    """A run in a group. Without a mode or a key it is offline, and `wandb sync` uploads it later: wandb would ask and wait."""
    import wandb

    known = "WANDB_MODE" in os.environ or wandb.login(prompt=False)
    with wandb.init(
        project=os.environ.get("WANDB_PROJECT", "rightrank"),
        group=run.group,
        id=f"{run.group}-{run.key}",
        name=run.name,
        job_type="decision" if run.key == "decision" else "trial",
        config=dict(run.config),
        mode=None if known else "offline",
        reinit="finish_previous",
        resume="allow",
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
    ) as opened:
        for step, values in run.steps.items():
            opened.log(dict(values), step=step)
        if run.examples:
            rows = [[number, *scores] for number, scores in enumerate(zip(*run.examples.values(), strict=True))]
            opened.log({"items": wandb.Table(columns=["item", *run.examples], data=rows)})
        opened.summary.update(dict(run.summary))
        if run.failed:
            opened.finish(exit_code=1)


def _trackio(run: TrackedRun, _folder: Path) -> None:
    """A run in the local store, in a group; no dashboard is opened."""
    import trackio

    opened = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", "rightrank"),
        name=f"{run.group}/{run.name}",
        group=run.group,
        config=dict(run.config) | {f"summary/{name}": text for name, text in run.texts().items()},
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    for step, values in run.steps.items():
        opened.log(dict(values), step=step)
    if numbers := run.numbers():
        opened.log(numbers, step=max(run.steps, default=0))
    opened.finish()


Plain: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class TrackedRun:
    key: str  # the trial's identity
    name: str  # readable, and valid as a folder name
    group: str
    config: Mapping[str, Plain]
    steps: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # step → name → number
    examples: Mapping[str, list[float]] = field(default_factory=dict)  # name → one number per held-out example
    summary: Mapping[str, Plain] = field(default_factory=dict)
    failed: bool = False

    def points(self) -> Iterator[tuple[int, str, float]]:
        """Step, name and number; for numbers by example, the step is the example's index."""
        for step, values in self.steps.items():
            yield from ((step, name, value) for name, value in values.items())
        for name, scores in self.examples.items():
            yield from ((number, name, score) for number, score in enumerate(scores))

    def last_points(self) -> Iterator[tuple[int, str, float]]:
        """The numbers of the summary that no step has, at the last step."""
        written = {name for values in self.steps.values() for name in values}
        last = max(self.steps, default=0)
        yield from ((last, name, value) for name, value in self.numbers().items() if name not in written)

    def numbers(self) -> dict[str, float]:
        """The numbers of the summary."""
        return {name: value for name, value in self.summary.items() if isinstance(value, int | float)}

    def texts(self) -> dict[str, str | None]:
        """The rest of the summary."""
        return {name: value for name, value in self.summary.items() if isinstance(value, str | None)}


def _tracked_trial(started: RunStarted, outcome: TrialOutcome, group: str) -> TrackedRun:
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
    config |= {f"settings/{name}": plain(value) for name, value in started.settings.items()}
    name = f"r{arm.rank}-lr{arm.learning_rate:g}-seed{arm.seed}-{outcome.trial_id[:6]}"
    if not isinstance(outcome, TrialFinished):
        summary = {"outcome": outcome.type, "reason": outcome.reason}
        return TrackedRun(outcome.trial_id, name, group, config, summary=summary, failed=True)
    prefix = "eval" if whole else "stage"
    return TrackedRun(
        outcome.trial_id,
        name if whole else f"stage-{outcome.trial_id}",
        group,
        config,
        steps=_steps(started, outcome, prefix),
        examples=_by_example(started.metric, outcome) if whole else {},
        summary={f"{prefix}/{metric}": value for metric, value in outcome.metrics.items()}
        | {
            "outcome": outcome.type,
            "train_seconds": outcome.train_seconds,
            "eval_seconds": outcome.eval_seconds,
            "trainable_parameters": outcome.trainable_parameters,
            "peak_bytes": outcome.peak_bytes,
        },
    )


def _tracked_decision(started: RunStarted, decision: Decision, group: str) -> TrackedRun:
    """The decision as the last run of the group."""
    summary: dict[str, Plain] = {
        f"decision/{name}": plain(value)
        for name, value in decision.model_dump(mode="json").items()
        if name not in ("ranks", "staircase", "next_runs", "other_metrics")
    }
    summary["decision/ranks"] = json.dumps([evidence.model_dump(mode="json") for evidence in decision.ranks])
    config = {f"settings/{name}": plain(value) for name, value in started.settings.items()}
    return TrackedRun("decision", "decision", group, config, summary=summary)


def plain(value: object) -> Plain:
    """The value itself if every tracker can hold it, else JSON."""
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value)


def _steps(started: RunStarted, trial: TrialFinished, prefix: str) -> dict[int, dict[str, float]]:
    along = started.points_metric or started.metric
    found: dict[int, dict[str, float]] = {}
    for step, loss in enumerate(trial.train_losses, start=1):
        found.setdefault(step, {})["train/loss"] = loss
    for point in trial.points:
        found.setdefault(point.step, {})[f"{prefix}/{along}"] = point.value
    last = trial.steps if trial.stop_at is None else trial.stop_at
    found.setdefault(last, {}).update({f"{prefix}/{metric}": value for metric, value in trial.metrics.items()})
    found[last]["train_seconds"] = trial.train_seconds
    return dict(sorted(found.items()))


def _by_example(metric: str, trial: TrialFinished) -> dict[str, list[float]]:
    """`items/METRIC` (the mean of each example) and the weights, for the metric that decides."""
    found = trial.items(metric)
    if found is None:
        return {}
    sums, weights = found
    return {
        f"items/{metric}": [score / weight for score, weight in zip(sums, weights, strict=True)],
        "items/tokens": list(weights),
    }
