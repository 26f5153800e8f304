"""A worker whose run folder is on its own disk, and a store that takes what others will want of it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rightrank.engine.arm_training import CHECKPOINT_SHARE
from rightrank.engine.distributed import process_index
from rightrank.errors import InterruptedRun
from rightrank.executors import Executor
from rightrank.io.run_folder import RunFolder
from rightrank.io.store import Store
from rightrank.records import Trial, TrialOutcome


class StoredExecutor:
    """Files of an outcome are in the store before the outcome is told."""

    def __init__(self, executor: Executor, sync: StoreSync) -> None:
        self._executor = executor
        self._sync = sync

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        self._sync.bring_for(trials)
        try:
            for outcome in self._executor.run(trials, base_loss):
                self._sync.send_of(outcome)
                yield outcome
                self._sync.drop_of(outcome)
        except InterruptedRun:
            self._sync.send_checkpoints()
            raise


class StoreSync:
    """Brings what trials begin from, sends what they leave."""

    def __init__(self, folder: RunFolder, store: Store) -> None:
        self._folder = folder
        self._store = store
        self._under_way: list[Path] = []  # checkpoints of the task's trials
        self._sent: dict[Path, int] = {}  # checkpoint → when it had been changed last, ns
        self._next_sending = 0.0  # by the monotonic clock

    def bring_for(self, trials: Sequence[Trial]) -> None:
        """Checkpoints that other workers may have left; parents' checkpoints and adapters."""
        self._under_way = [self._folder.checkpoint(trial.trial_id) for trial in trials]
        for path in self._under_way:
            if self._bring(path):
                self._sent[path] = path.stat().st_mtime_ns
        for arm in (trial.arm for trial in trials):
            if arm.continue_from is not None:
                self._bring(self._folder.checkpoint(arm.continue_from))
            if arm.truncate_from is not None:
                self._bring(self._folder.trial_adapter(arm.truncate_from))

    def send_of(self, outcome: TrialOutcome) -> None:
        """Its adapter and answers; where it was stopped early, its checkpoint: another goes on from there, anywhere."""
        for path in (self._folder.trial_adapter(outcome.trial_id), self._folder.answers(outcome.trial_id)):
            if path.exists():
                self._store.put(path, self._name(path))
        if outcome.arm.stop_at is not None:
            self.send_checkpoints()

    def drop_of(self, outcome: TrialOutcome) -> None:
        """What is in the store is not kept here too; nobody goes on from a trial that has ended."""
        shutil.rmtree(self._folder.trial_adapter(outcome.trial_id), ignore_errors=True)
        checkpoint = self._folder.checkpoint(outcome.trial_id)
        if outcome.arm.stop_at is None and self._sent.pop(checkpoint, None) is not None and process_index() == 0:
            self._store.remove(self._name(checkpoint))

    def send_due(self) -> None:
        """Send checkpoints that were written since, where that costs no more of the time than writing them may."""
        begun = time.monotonic()
        if begun >= self._next_sending and self.send_checkpoints():
            ended = time.monotonic()
            self._next_sending = ended + (ended - begun) / CHECKPOINT_SHARE

    def send_checkpoints(self) -> bool:
        """Send those that have changed since they were sent last; whether there were any."""
        written = {path: path.stat().st_mtime_ns for path in self._under_way if path.exists()}
        changed = {path: at for path, at in written.items() if self._sent.get(path) != at}
        for path in changed:
            self._store.put(path, self._name(path))
        self._sent |= changed
        return bool(changed)

    def _bring(self, path: Path) -> bool:
        return self._store.get(self._name(path), path)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder.path).as_posix()
