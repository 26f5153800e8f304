"""The trackers of a selection. Each logs every trial once, however often the selection is resumed."""

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
from rightrank.records import OUTCOMES, Decision, RunEvent, RunStarted, TrialOutcome
from rightrank.records.observer import Observer
from rightrank.trackers.tracked import TrackedRun, tracked_decision, tracked_trial

TRACKERS = ("trackio", "wandb", "mlflow", "tensorboard")  # each is the name of its package too
LOGGED_FILE = "tracked.json"


class Tracker(Protocol):
    """Writes finished runs to one tracking system.

    An implementation writes a run as a whole and leaves runs of the surrounding process alone. If it raises, the
    selection continues without this tracker. Example:

        class PrintTracker:
            def write(self, run: TrackedRun) -> None:
                print(run.name, run.config, run.summary)
    """

    def write(self, run: TrackedRun) -> None:
        """Write one trial or the decision."""


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


class Trackers:
    def __init__(
        self, names: Sequence[str], folder: Path, started: RunStarted, notice: Callable[[str], None] = lambda _: None
    ) -> None:
        self._folder = folder
        self._started = started
        self._notice = notice
        self._group = f"{folder.resolve().name}-{started.fingerprint[:6]}"
        self._trackers = {name: _make(name, folder) for name in require_trackers(names)}
        self._logged: dict[str, list[str]] = self._read()

    def attached_to(self, observer: Observer) -> Observer:
        """An observer that also logs every event, after `observer` receives it."""

        def on_event(event: RunEvent) -> None:
            observer.on_event(event)
            self.event(event)

        return replace(observer, on_event=on_event)

    def catch_up(self, outcomes: Iterable[TrialOutcome]) -> None:
        """Log the trials that an interrupted run did not log."""
        for outcome in outcomes:
            self.event(outcome)

    def event(self, event: RunEvent) -> None:
        """Log a trial that ended to every tracker that does not have it yet."""
        if self._trackers and isinstance(event, OUTCOMES):
            self._log(tracked_trial(self._started, event, self._group))

    def decided(self, decision: Decision) -> None:
        if self._trackers:
            self._log(tracked_decision(self._started, decision, self._group))

    def _log(self, run: TrackedRun) -> None:
        for name, tracker in list(self._trackers.items()):
            logged = self._logged.setdefault(name, [])
            if run.key in logged:
                continue
            try:
                with redirect_stdout(sys.stderr):  # stdout is reserved for the answer
                    tracker.write(run)
            except Exception as error:  # noqa: BLE001 - an unreachable tracker must not end the selection
                reason = " ".join(str(error).split())[:200]
                self._notice(
                    f"{name}: logging stopped ({type(error).__name__}: {reason}); run again to log the missing trials"
                )
                del self._trackers[name]
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
