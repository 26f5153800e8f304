"""A selection before it runs: the request, the prepared selection, and the executor that runs its trials."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from rightrank.runs.folder import RunFolder
from rightrank.schema.events import (
    JournalRecord,
    Listener,
    Records,
    RunStarted,
    TestEvaluated,
)
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Trial, TrialFinished, TrialOutcome
from rightrank.search.protocol import Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Rows: TypeAlias = Iterable[Mapping[str, object]]  # a `datasets.Dataset` is one


@dataclass(frozen=True, slots=True)
class SelectionRequest:
    """The model, the data and the settings of a selection, before data and base are loaded."""

    model: str | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    data: str | Path | Rows | Mapping[str, Rows]
    settings: SelectSettings
    original_settings: Mapping[str, Any] | None = None  # of a resumed run: the settings with which it began

    @property
    def model_name(self) -> str:
        return self.model if isinstance(self.model, str) else f"in memory ({type(self.model).__name__})"

    @property
    def data_name(self) -> str:
        if not isinstance(self.data, str | Path):
            return f"in memory ({type(self.data).__name__})"
        return (
            str(self.data).encode("utf-8", "backslashreplace").decode()
        )  # a file name may contain bytes that JSON can't hold


@dataclass(frozen=True, kw_only=True)
class PreparedSelection:
    """A prepared selection. Custom trainers load no base model, and the methods that need it then return their defaults."""

    started: RunStarted
    settings: SelectSettings  # with the ranks that fit the memory
    steps: int  # optimizer steps of a full training; 0: a custom trainer chooses the number
    strategy: Strategy
    notes: tuple[str, ...] = ()  # lines for a person
    # Whether only this run writes to `cache/` and `checkpoints/`; a custom trainer may keep its own files there.
    owns_working_folders: bool = True
    advice: str = (
        "give lower learning rates, a smaller batch_size or seq_len, and a new --out"  # shown if every trial fails
    )

    @property
    def base_identity(self) -> bytes | None:
        """Return the content of the file that identifies an adapter's base; None if this process loads no base."""
        return None

    def open_executor(
        self, folder: RunFolder, listener: Listener, records: Records
    ) -> AbstractContextManager[Executor]:
        """Open the executor of the trials for the length of the block; `records` follow the journal as it grows."""
        raise NotImplementedError

    def evaluate_test_split(self, trial: TrialFinished, adapter: Path | None) -> TestEvaluated | None:
        """Evaluate the trial's adapter, or the base, on the test split; None without one."""
        return None


class Executor(Protocol):
    """Runs trials and yields the outcome of each. The caller keeps the strategy and the journal.

    An implementation must keep these rules:

    - Each trial gets exactly one outcome, with the trial's `trial_id` and arm. The order is free.
    - A trial that can't be trained is an outcome (`TrialDiverged`, `TrialFailed`), not an exception. Exceptions mean
      that no trial can run.
    - Training depends on the trial alone: the same trial gives the same values on any worker, together with any other trials.
    - Before a `TrialFinished` is yielded, its adapter is in `RunFolder.get_trial_folder`.
    - The caller may close the iterator early; the executor then stops its trials and can be used again.
    - It writes neither the journal nor the decision.
    """

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        """Yield one outcome per trial as the trials end.

        Args:
            trials: the trials to run; rank 0 is the evaluation of the base.
            base_loss: the base's held-out loss in nats; None until the base has been evaluated.

        Raises:
            InterruptedRun: the user asked to stop; finished trials have been yielded, others have checkpoints.
        """
        ...


# Prepares a selection for a folder that has this journal, and writes nothing. It raises `InputError` if model, data, settings or folder
# can't be used.
Prepare: TypeAlias = Callable[[RunFolder, Sequence[JournalRecord]], PreparedSelection]
