"""Makes the pool that the settings ask for, with a probe file that proves that its workers see the run folder."""

from __future__ import annotations

import secrets
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from rightrank.data.files import write_text
from rightrank.plugins.cluster.pool import Crew, Job, Pool, PoolOptions, WorkerSetup
from rightrank.plugins.cluster.processes import ProcessCrew
from rightrank.plugins.cluster.worker import versions
from rightrank.runs.executor import Executor
from rightrank.runs.folder import RunFolder, Store
from rightrank.schema.errors import InterruptedRun, SettingsError
from rightrank.schema.events import Listener
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Trial, TrialOutcome
from rightrank.train.distributed import process_index
from rightrank.train.runtime import Runtime
from rightrank.train.trial import CHECKPOINT_SHARE


class StoredExecutor:
    """Wraps an executor: the files of an outcome are in the store before the outcome is yielded."""

    def __init__(self, executor: Executor, sync: StoreSync) -> None:
        self._executor = executor
        self._sync = sync

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
        self._folder = folder
        self._store = store
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
        if outcome.arm.stop_at is None and self._uploaded.pop(checkpoint, None) is not None and process_index() == 0:
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


MAX_TASK_TRIALS = 16  # the worker measures how many of them to train in one pass


@dataclass(frozen=True, slots=True)
class WorkerNeeds:
    bytes_planned: int | None  # peak memory; None: the architecture can't be planned
    on_cuda: bool


@contextmanager
def open_pool(
    settings: SelectSettings,
    jobs: Sequence[Job],
    folder: Path,
    needs: WorkerNeeds,
    listener: Listener,
    job_listeners: Mapping[str, Listener] | None = None,
) -> Iterator[Pool]:
    """A pool of workers for `jobs`, whose run folders are `folder` itself or inside it. Workers start on demand.

    `listener` receives what concerns all jobs, and the events of those that `job_listeners` does not name.

    Raises:
        SettingsError: no number of workers, or fewer CUDA devices than `devices_per_arm`.
        MissingExtraError: the executor's package is not installed.
        RunError: the cluster or the store does not answer.
    """
    token = secrets.token_hex(16)
    with _probe(settings.store, folder, token) as name:
        share = settings.store or str(folder.absolute())
        setup = WorkerSetup(jobs=list(jobs), working_folder=Path.cwd(), share=share, probe=name)
        crew, workers = _crew(settings, setup, folder, needs)
        options = PoolOptions(workers, versions(), token, _task_trials(settings, needs), settings.hang_seconds)
        pool = Pool(crew, options, listener, job_listeners)
        try:
            yield pool
        finally:
            pool.close()


@contextmanager
def _probe(address: str, folder: Path, token: str) -> Iterator[str]:
    """Write the token to a file in the run folder, or in the store if there is one, and return the file's name."""
    for stale in folder.glob(".share-*"):  # from a driver that was killed; this process holds the folder's lock
        stale.unlink(missing_ok=True)
    probe = folder / f".share-{secrets.token_hex(4)}"
    store = Store(address) if address else None
    write_text(probe, token)
    try:
        if store is not None:
            store.put(probe, probe.name)
        yield probe.name
    finally:
        probe.unlink(missing_ok=True)
        if store is not None:
            store.remove(probe.name)


def _crew(settings: SelectSettings, setup: WorkerSetup, folder: Path, needs: WorkerNeeds) -> tuple[Crew, int]:
    """The crew and its maximum number of workers."""
    logs, size = folder / "workers", settings.devices_per_arm
    if settings.executor == "ray":
        from rightrank.plugins.cluster.ray_cluster import RayCrew

        crew = RayCrew(setup, settings.ray_address, needs.bytes_planned, needs.on_cuda, size=size)
        return crew, settings.workers or crew.room()
    devices = torch.cuda.device_count() if needs.on_cuda and not settings.launcher else 0
    if devices and devices < size:
        raise SettingsError(
            f"devices_per_arm {size} needs {size} CUDA devices, this machine has {devices}; give {devices} or fewer"
        )
    workers = settings.workers or devices // size
    if not workers:
        raise SettingsError("executor 'processes' needs the number of workers on a CPU: give it, such as --workers 2")
    return ProcessCrew(setup, logs, devices, shlex.split(settings.launcher), size=size), workers


def _task_trials(settings: SelectSettings, needs: WorkerNeeds) -> int:
    return settings.adapters_per_pass or (MAX_TASK_TRIALS if needs.on_cuda else 1)


@contextmanager
def offloaded_base(runtime: Runtime) -> Iterator[None]:
    """Move the driver's base to the CPU while workers use the accelerator."""
    device = runtime.loaded.device
    if device.type == "cpu" or runtime.settings.weight_bits is not None:  # quantised matrices can't be moved
        yield
        return
    runtime.model.to("cpu")
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        runtime.model.to(device)
