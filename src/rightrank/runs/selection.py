"""A selection: the request, the prepared selection, the executor that runs its trials, and the result."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from rightrank.report.answer import Answers
from rightrank.runs.folder import RunFolder, build_trials_frame
from rightrank.schema.errors import ResultsError
from rightrank.schema.events import JournalRecord, Listener, Records, RunStarted, TestEvaluated, read_records
from rightrank.schema.results import Decision
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Trial, TrialFinished, TrialOutcome
from rightrank.search.protocol import Strategy

if TYPE_CHECKING:
    from pandas import DataFrame
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


@dataclass(frozen=True, slots=True)
class SelectedRank:
    """A selected rank: the deployment rank or the training rank."""

    rank: int | None  # None: undecided, or no rank is better than the base
    sentence: str
    # The folder of an adapter of that rank, or else of `recommended_rank`; None: no adapter was saved.
    path: Path | None


@dataclass(frozen=True, slots=True, repr=False)
class Selected:
    """The result of a selection: deployment rank and training rank, and the paths of run folder, adapter and report."""

    run: Path
    # The smallest adapter within the margin, in `adapter/`; None if a custom trainer saved none.
    adapter: SelectedRank | None
    training: SelectedRank | None  # None unless the goal is "training-rank"
    report: Path
    answers: Answers  # deployment rank and training rank; `build_document()` returns the content of decision.json

    @property
    def next_command(self) -> str | None:
        """Return the first command among the next runs; None if there is none."""
        return next((command for command in self.answers.next_commands if command is not None), None)

    @property
    def decision(self) -> Decision:
        """Return the decision on the training rank.

        Raises:
            ResultsError: the training rank was not the goal.
        """
        if self.answers.decision is None:
            raise ResultsError(
                f"{self.run}: goal {self.answers.goal!r} has no decision on the training rank; see adapter and answers, or select "
                "again with goal 'training-rank'"
            )
        return self.answers.decision

    @property
    def cost(self) -> Mapping[str, float | None]:
        """Return the cost. `trainings`: optimizer steps of all trials divided by those of one training; `trainings_to_adapter`: those up to the deployment rank."""
        return self.answers.cost

    def __repr__(self) -> str:
        """Return the ranks and the run folder on one line; `print` shows more."""
        verdict = None if self.answers.decision is None else self.answers.decision.verdict
        adapter, training = (None if answer is None else answer.rank for answer in (self.adapter, self.training))
        return f"Selected(adapter={adapter}, training={training}, verdict={verdict!r}, run={str(self.run)!r})"

    def __str__(self) -> str:
        """Return the final screen: the result in at most fourteen lines. The fields hold the details."""
        from rightrank.report.screen import format_screen

        adapter = None if self.adapter is None else self.adapter.path
        return format_screen(self.answers, self.run, adapter, self.report, shutil.get_terminal_size((80, 24)).columns)

    def to_pandas(self, *, examples: bool = False) -> DataFrame:
        """Return the trials as a table, or the scores of their held-out examples; see `rightrank.to_pandas`."""
        records = read_records(RunFolder(self.run).journal.read_complete_lines(), str(self.run))
        return build_trials_frame(records, examples)
