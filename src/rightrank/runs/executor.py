"""Runs trials in this process on one device, one after the other or several adapters per pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rightrank.runs.folder import RunFolder
from rightrank.schema.events import Listener, Notice
from rightrank.schema.trials import Trial, TrialOutcome
from rightrank.train.loop import train_trials
from rightrank.train.pace import adapters_per_pass_for
from rightrank.train.runtime import Runtime
from rightrank.train.trial import TrialFolders


class LocalExecutor:
    """The executor of a single process. Errors other than running out of memory propagate with their traceback."""

    def __init__(
        self,
        runtime: Runtime,
        folder: RunFolder,
        listener: Listener,
        max_adapters_per_pass: int | None = None,
    ) -> None:
        self._runtime = runtime
        self._folder = folder
        self._listener = listener
        self._max_adapters_per_pass = max_adapters_per_pass  # adapters per pass that fit by the plan; None: not planned
        self._prepared = False

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        base = [trial for trial in trials if trial.arm.rank == 0]
        trained = [trial for trial in trials if trial.arm.rank > 0]
        yield from train_trials(self._runtime, base, base_loss, self._folders, self._listener)
        if not trained:
            return
        if not self._prepared:
            self._runtime.prepare(self._listener.on_event, self._listener.should_stop)
            self._prepared = True
        arms = [trial.arm for trial in trained]
        # Processes that share an arm must agree: all use the number that process 0 has measured.
        size = adapters_per_pass_for(
            self._runtime, arms, lambda text: self._listener.on_event(Notice(text=text)), self._max_adapters_per_pass
        )
        yield from train_trials(self._runtime, trained, base_loss, self._folders, self._listener, size)

    def _folders(self, trial: Trial) -> TrialFolders:
        arm, folder = trial.arm, self._folder
        return TrialFolders(
            folder.checkpoint(trial.trial_id),
            folder.trial_adapter(trial.trial_id),
            None if arm.continue_from is None else folder.checkpoint(arm.continue_from),
            None if arm.truncate_from is None else folder.trial_adapter(arm.truncate_from),
            None if arm.truncate_from is None else folder.moments(arm.truncate_from),
            folder.answers(trial.trial_id),
        )
