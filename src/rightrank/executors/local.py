"""In this process, one arm after the other, on one device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence

import torch

from rightrank.engine.bench import Bench
from rightrank.engine.train import TrialFolders, Watcher, run_trial
from rightrank.io.models import first_line
from rightrank.io.run_folder import RunFolder
from rightrank.records import Trial, TrialFailed, TrialOutcome, TrialStarted

# What the CPU allocator says when it has no more; torch raises a plain RuntimeError there.
_CPU_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")


class LocalExecutor:
    """Exceptions that are not about memory come out as they are: in-process, a bug should show where it is."""

    def __init__(
        self, bench: Bench, folder: RunFolder, watcher: Watcher, on_start: Callable[[TrialStarted], None]
    ) -> None:
        self._bench = bench
        self._folder = folder
        self._watcher = watcher
        self._on_start = on_start
        self._prepared = False

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        for trial in trials:
            if trial.arm.rank > 0 and not self._prepared:
                self._bench.prepare(self._watcher.on_prepare, self._watcher.should_stop)
                self._prepared = True
            self._on_start(TrialStarted(trial_id=trial.trial_id, **trial.arm.model_dump()))
            yield self._run_one(trial, base_loss)

    def _run_one(self, trial: Trial, base_loss: float | None) -> TrialOutcome:
        folders = self._folders(trial)
        try:
            return run_trial(self._bench, trial, base_loss, folders, self._watcher)
        except (torch.OutOfMemoryError, MemoryError) as error:
            reason = first_line(error)
        except RuntimeError as error:
            if not any(sign in str(error) for sign in _CPU_OUT_OF_MEMORY):
                raise
            reason = first_line(error)
        gc.collect()
        if self._bench.loaded.device.type == "cuda":
            torch.cuda.empty_cache()
        return TrialFailed(
            trial_id=trial.trial_id,
            **trial.arm.model_dump(),
            error="out_of_memory",
            reason=f"{trial.arm.label()} ran out of memory on {self._bench.loaded.device}: {reason}",
        )

    def _folders(self, trial: Trial) -> TrialFolders:
        arm, folder = trial.arm, self._folder
        return TrialFolders(
            folder.checkpoint(trial.trial_id),
            folder.trial_adapter(trial.trial_id),
            None if arm.continue_from is None else folder.checkpoint(arm.continue_from),
            None if arm.truncate_from is None else folder.trial_adapter(arm.truncate_from),
        )
