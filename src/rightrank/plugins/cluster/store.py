"""Machines that share no disk: what trials start from and leave goes through the run's store."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rightrank.runs.folder import RunFolder, Store
from rightrank.runs.hook import Executor
from rightrank.schema.errors import InterruptedRun
from rightrank.schema.trials import Trial, TrialOutcome
from rightrank.train.trial import CHECKPOINT_SHARE


class StoredExecutor:
    """Wraps an executor: the files of an outcome are in the store before the outcome is yielded."""

    def __init__(self, executor: Executor, sync: StoreSync) -> None:
        self._executor, self._sync = executor, sync

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        self._sync.download_for(trials)
        try:
            for outcome in self._executor.run(trials, base_loss):
                self._sync.upload(outcome)
                yield outcome
                self._sync.clean_up(outcome)
        except InterruptedRun:
            self._sync.upload_checkpoints()
            raise


class StoreSync:
    """Downloads what trials start from and uploads what they leave."""

    def __init__(self, folder: RunFolder, store: Store) -> None:
        self._folder, self._store = folder, store
        self._checkpoints: list[Path] = []  # of the current task's trials
        self._uploaded: dict[Path, int] = {}  # checkpoint → its modification time in the store, ns
        self._next_upload = 0.0  # on the monotonic clock

    def download_for(self, trials: Sequence[Trial]) -> None:
        """Fetch checkpoints that other workers may have left, and parents' checkpoints and adapters."""
        self._checkpoints = [self._folder.checkpoint(trial.trial_id) for trial in trials]
        for path in self._checkpoints:
            if self._download(path):
                self._uploaded[path] = path.stat().st_mtime_ns
        for arm in (trial.arm for trial in trials):
            if arm.continue_from is not None:
                self._download(self._folder.checkpoint(arm.continue_from))
            if arm.truncate_from is not None:
                self._download(self._folder.trial_adapter(arm.truncate_from))

    def upload(self, outcome: TrialOutcome) -> None:
        """Send the trial's adapter and answers, and its checkpoint if it was stopped early: any worker may resume it."""
        for path in (self._folder.trial_adapter(outcome.trial_id), self._folder.answers(outcome.trial_id)):
            if path.exists():
                self._store.put(path, self._name(path))
        if outcome.arm.stop_at is not None:
            self.upload_checkpoints()

    def clean_up(self, outcome: TrialOutcome) -> None:
        """Remove the local adapter, and the stored checkpoint of a trial that has ended and is never resumed."""
        shutil.rmtree(self._folder.trial_adapter(outcome.trial_id), ignore_errors=True)
        checkpoint = self._folder.checkpoint(outcome.trial_id)
        if outcome.arm.stop_at is None and self._uploaded.pop(checkpoint, None) is not None:
            self._store.remove(self._name(checkpoint))

    def upload_due(self) -> None:
        """Send new checkpoints, so seldom that uploads take at most `CHECKPOINT_SHARE` of the time."""
        begun = time.monotonic()
        if begun >= self._next_upload and self.upload_checkpoints():
            ended = time.monotonic()
            self._next_upload = ended + (ended - begun) / CHECKPOINT_SHARE

    def upload_checkpoints(self) -> bool:
        """Send checkpoints that have changed since their last upload; whether there were any."""
        written = {path: path.stat().st_mtime_ns for path in self._checkpoints if path.exists()}
        changed = {path: at for path, at in written.items() if self._uploaded.get(path) != at}
        for path in changed:
            self._store.put(path, self._name(path))
        self._uploaded |= changed
        return bool(changed)

    def _download(self, path: Path) -> bool:
        return self._store.get(self._name(path), path)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder.path).as_posix()
