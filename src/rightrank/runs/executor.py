"""A run at work: what it has to do, what the journal says by now, and where its trials run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from rightrank.decision.records import Records
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import Hooks
from rightrank.runs.plugins import MemoryPlan
from rightrank.runs.values import Plan, Prepared
from rightrank.schema.events import Event, Journaled, JournalRecord, Listener, RunContinued, RunStarted
from rightrank.schema.trials import Trial, TrialOutcome
from rightrank.train.loop import train_trials
from rightrank.train.pace import adapters_per_pass_for
from rightrank.train.runtime import Runtime
from rightrank.train.trial import TrialFolders


@dataclass(frozen=True, eq=False)
class Run(Listener):
    """What is to be done, where, and what the journal says by now. What happens is kept there, and passed to the hooks."""

    plan: Plan
    folder: RunFolder
    hooks: Hooks
    records: Records
    opening: (
        RunStarted | RunContinued | None
    )  # its first record, or other settings with which it continues; None: as it was

    @property
    def prepared(self) -> Prepared | None:
        """The plan, with base and data loaded; None: a custom trainer has them."""
        return self.plan if isinstance(self.plan, Prepared) else None

    def on_event(self, event: Event) -> None:
        """Keep the event in the journal, if it is a record, and pass it on to the hooks."""
        if isinstance(event, Journaled):
            self.record(event)
        self.hooks.on_event(event)

    def record(self, record: JournalRecord) -> None:
        """Keep a record in the journal."""
        self.folder.journal.append(record)
        self.records.keep(record)

    def should_stop(self) -> bool:
        return self.hooks.should_stop()


class Executor(Protocol):
    """Runs trials and yields how each of them ended. The driver keeps the strategy and the journal.

    An implementation must keep these rules:

    - Each trial gets exactly one outcome, with the trial's `trial_id` and arm. The order is free.
    - A trial that can't be trained is an outcome (`TrialDiverged`, `TrialFailed`), not an exception. Exceptions mean
      that no trial can run.
    - Training depends on the trial alone: the same trial gives the same values on any worker, beside any other trial.
    - Before a `TrialFinished` is yielded, its adapter is in `RunFolder.trial_adapter`.
    - The caller may close the iterator early; the executor then stops what it started and can be used again.
    - It writes neither to the journal nor to the decision.

    For example, an executor that evaluates a formula:

        class FormulaExecutor:
            def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
                for trial in trials:
                    result = TrialResult(metrics={"loss": 1.0 + 1.0 / (1 + trial.arm.rank)})
                    yield outcome_of(trial, result, metric="loss", seconds=0.0)
    """

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        """Yield one outcome per trial as the trials end.

        Args:
            trials: what to train; rank 0 is the evaluation of the base.
            base_loss: the base's held-out loss in nats; None until the base has been evaluated.

        Raises:
            InterruptedRun: the user asked to stop; finished trials have been yielded, others have checkpoints.
        """
        ...


# An executor, within whose context workers run.
Workplace: TypeAlias = Callable[[Run], AbstractContextManager[Executor]]


@dataclass(slots=True)
class LocalExecutor:
    """The executor of a single process. Errors other than running out of memory propagate with their traceback."""

    _runtime: Runtime
    _folder: RunFolder
    _listener: Listener
    _planned: MemoryPlan | None = None
    _is_prepared: bool = False

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        base = [trial for trial in trials if trial.arm.rank == 0]
        trained = [trial for trial in trials if trial.arm.rank > 0]
        yield from train_trials(self._runtime, base, base_loss, self._folders, self._listener)
        if not trained:
            return
        if not self._is_prepared:
            self._runtime.prepare(self._listener.on_event, self._listener.should_stop)
            self._is_prepared = True
        arms = [trial.arm for trial in trained]
        largest = self._planned.max_adapters_per_pass if self._planned else None
        size = adapters_per_pass_for(self._runtime, arms, self._listener.notice, largest)
        yield from train_trials(self._runtime, trained, base_loss, self._folders, self._listener, size)

    def _folders(self, trial: Trial) -> TrialFolders:
        arm, folder = trial.arm, self._folder
        parent = arm.truncate_from
        return TrialFolders(
            folder.checkpoint(trial.trial_id),
            folder.trial_adapter(trial.trial_id),
            None if arm.continue_from is None else folder.checkpoint(arm.continue_from),
            None if parent is None else folder.trial_adapter(parent),
            None if parent is None else folder.checkpoint(parent).with_suffix(".moments.safetensors"),
            folder.answers(trial.trial_id),
        )
