"""Who is told: the trackers asked for, each of every trial once, however often the selection was resumed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from rightrank.errors import MissingExtraError, SettingsError, did_you_mean
from rightrank.io.files import write_text
from rightrank.records import Decision, RunEvent, RunStarted, TrialDiverged, TrialFailed, TrialFinished, TrialOutcome
from rightrank.records.observer import Observer
from rightrank.trackers.tracked import TrackedRun, tracked_decision, tracked_trial

MODULES = {"trackio": "trackio", "wandb": "wandb", "mlflow": "mlflow", "tensorboard": "tensorboard"}  # what each needs
TOLD_FILE = "tracked.json"


class Tracker(Protocol):
    """One tracker. Whatever it raises ends its part in the selection and nothing else."""

    def write(self, run: TrackedRun) -> None: ...


def require_trackers(names: Sequence[str]) -> tuple[str, ...]:
    """The trackers that are meant; `all` are those installed, `none` is nobody, as in transformers.

    Raises:
        SettingsError: one that is not known.
        MissingExtraError: one that is not installed.
    """
    if tuple(names) == ("none",):
        return ()
    if tuple(names) == ("all",):
        return tuple(name for name, module in MODULES.items() if find_spec(module) is not None)
    for name in names:
        if name not in MODULES:
            raise SettingsError(
                f"report_to {name!r} is not known{did_you_mean(name, MODULES)}; there are: {', '.join(MODULES)}, all, none"
            )
        if find_spec(MODULES[name]) is None:
            raise MissingExtraError(f"report_to {name!r} needs an extra: pip install 'rightrank[{name}]'")
    return tuple(dict.fromkeys(names))


class Trackers:
    """The trackers of one selection."""

    def __init__(
        self, names: Sequence[str], folder: Path, started: RunStarted, notice: Callable[[str], None] = lambda _: None
    ) -> None:
        self._folder = folder
        self._started = started
        self._notice = notice
        self._group = f"{folder.resolve().name}-{started.fingerprint[:6]}"
        self._trackers = {name: _make(name, folder) for name in require_trackers(names)}
        self._told: dict[str, list[str]] = self._read()

    def beside(self, observer: Observer) -> Observer:
        """The observer with every event sent to the trackers too, after it."""

        def on_event(event: RunEvent) -> None:
            observer.on_event(event)
            self.event(event)

        return replace(observer, on_event=on_event)

    def catch_up(self, outcomes: Iterable[TrialOutcome]) -> None:
        """Tell of what an interrupted run had no time to tell."""
        for outcome in outcomes:
            self.event(outcome)

    def event(self, event: RunEvent) -> None:
        """Tell of a trial that ended, whoever has not been told."""
        if self._trackers and isinstance(event, TrialFinished | TrialDiverged | TrialFailed):
            self._tell(tracked_trial(self._started, event, self._group))

    def decided(self, decision: Decision) -> None:
        """Tell of the decision."""
        if self._trackers:
            self._tell(tracked_decision(self._started, decision, self._group))

    def _tell(self, run: TrackedRun) -> None:
        for name, tracker in list(self._trackers.items()):
            told = self._told.setdefault(name, [])
            if run.key in told:
                continue
            try:
                with redirect_stdout(sys.stderr):  # stdout is for the answer
                    tracker.write(run)
            except Exception as error:  # noqa: BLE001 - a tracker that is away must not end the selection
                reason = " ".join(str(error).split())[:200]
                self._notice(
                    f"{name}: told of nothing more ({type(error).__name__}: {reason}); run again to tell it later"
                )
                del self._trackers[name]
                continue
            told.append(run.key)
            write_text(self._folder / TOLD_FILE, json.dumps(self._told) + "\n")

    def _read(self) -> dict[str, list[str]]:
        """Who was told of what; nobody of anything where that is not known."""
        try:
            told = json.loads((self._folder / TOLD_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return told if isinstance(told, dict) and all(isinstance(keys, list) for keys in told.values()) else {}


def _make(name: str, folder: Path) -> Tracker:
    if name == "wandb":
        from rightrank.trackers.wandb_tracker import WandbTracker

        return WandbTracker()
    if name == "mlflow":
        from rightrank.trackers.mlflow_tracker import MlflowTracker

        return MlflowTracker()
    if name == "trackio":
        from rightrank.trackers.trackio_tracker import TrackioTracker

        return TrackioTracker()
    from rightrank.trackers.tensorboard_tracker import TensorboardTracker

    return TensorboardTracker(folder / "tensorboard")
