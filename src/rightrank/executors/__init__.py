"""Where trials run: in this process, in worker processes, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from rightrank.records import Trial, TrialOutcome


class Executor(Protocol):
    """Runs trials and yields how each of them ended. The driver keeps the strategy and the journal.

    An implementation must keep these rules:

    - Each trial gets exactly one outcome, with the trial's `trial_id` and arm. The order is free.
    - A trial that can't be trained is an outcome (`TrialDiverged`, `TrialFailed`), not an exception. Exceptions mean
      that no trial can run.
    - Training depends on the trial alone: the same trial gives the same values on any worker, beside any other trial.
    - Before a `TrialFinished` is yielded, its adapter is in `RunFolder.trial_adapter` or in the run's store.
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
