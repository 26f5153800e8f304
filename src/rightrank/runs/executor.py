"""What a selection is asked for, what is to be done for it, and what runs its trials."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rightrank.decision.records import Records
from rightrank.runs.folder import RunFolder
from rightrank.schema.events import JournalRecord, Listener, RunStarted, TestEvaluated
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Trial, TrialFinished, TrialOutcome
from rightrank.search.protocol import Strategy


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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done, and where. A trainer of one's own has its base elsewhere: what needs one here is then left as it is."""

    started: RunStarted
    settings: SelectSettings  # with the settled ranks
    steps: int  # optimizer steps of a whole training; 0: a custom trainer's own number
    strategy: Strategy
    notes: tuple[str, ...] = ()  # of the preparation, for a person
    # Whether `cache/` and `checkpoints/` are this run's alone; a custom trainer may keep its own files under these names.
    owns_working_folders: bool = True
    advice: str = "give lower learning rates, a smaller batch_size or seq_len, and a new --out"  # if every trial fails

    @property
    def base_identity(self) -> bytes | None:
        """The file beside an adapter that its base is known by; None without a base in this process."""
        return None

    def workplace(self, folder: RunFolder, listener: Listener, records: Records) -> AbstractContextManager[Executor]:
        """What runs the trials, as long as the block; `records` are those of the journal, as it grows."""
        raise NotImplementedError

    def peak_of(self, ranks: Sequence[int]) -> int | None:
        """Bytes of tensors at the peak of these ranks in one pass; None: not planned."""
        return None

    def scored(self, trial: TrialFinished, adapter: Path | None) -> TrialFinished:
        """The trial with the scores of its adapter, or of the base, on the validation examples of this plan."""
        return trial

    def tested(self, trial: TrialFinished, adapter: Path | None) -> TestEvaluated | None:
        """The same on the test split; None without one."""
        return None


class Asked(Protocol):
    """A request: what a selection is asked for."""

    def plan(self, folder: RunFolder, journal: Sequence[JournalRecord], before: Plan | None) -> Plan:
        """What is to be done, where the folder has this journal; nothing is written.

        Args:
            before: The plan of the same request with fewer ranks or learning rates, whose base is loaded.

        Raises:
            InputError: model, data, settings or folder can't be used.
        """
        ...

    def extended(self, settings: SelectSettings) -> Asked:
        """The request with further ranks or learning rates."""
        ...
