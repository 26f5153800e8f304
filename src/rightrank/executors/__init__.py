"""Where arms run. An executor takes trials and yields their outcomes as they end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from rightrank.records import Trial, TrialOutcome


class Executor(Protocol):
    """Runs trials; the driver keeps the strategy and the journal."""

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        """Outcomes in whatever order the trials end.

        `base_loss` is the base's held-out loss, None until the base has been evaluated.

        Raises:
            InterruptedRun: asked to stop; what was finished has been yielded.
        """
        ...
