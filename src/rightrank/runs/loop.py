"""The loop: a strategy requests arms, an executor runs them, the journal stores the outcomes, `decide` judges.

The journal is the loop's only state, so a run that was killed resumes where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rightrank.decision.run import Records, decide_run, decision_so_far, settled_start, trainings
from rightrank.hooks.report import write_views
from rightrank.report.faults import ViewFaults
from rightrank.report.format import size
from rightrank.report.tables import took_line
from rightrank.runs.executor import Executor
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import Hooks
from rightrank.runs.request import made_with_others
from rightrank.schema.decision import AdapterAnswer, Decision, HandedOver
from rightrank.schema.errors import (
    AllTrialsFailedError,
    DeviceMemoryError,
    InterruptedRun,
    ResultsError,
    RunFolderError,
)
from rightrank.schema.events import (
    AdapterRecorded,
    Event,
    GuardAnswer,
    JournalRecord,
    Listener,
    RunContinued,
    RunStarted,
)
from rightrank.schema.results import SelectionCost
from rightrank.schema.settings import CONTINUABLE, Goal, settings_difference
from rightrank.schema.trials import (
    Trial,
    TrialCollapsed,
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialLook,
    TrialOutcome,
    TrialStarted,
    trial_id,
)
from rightrank.search.history import History, seconds_of, steps_of
from rightrank.search.protocol import Strategy

MAX_VIEWS_SHARE = 0.05  # of the wall time, for writing the report while trials run
MAX_FAILED_AT_START = 3  # trials that fail before any finishes: then the cause is no single arm


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """What differs between the trainers that a loop drives."""

    goal: Goal = "training-rank"
    advice: str = "give lower learning rates, a smaller batch_size or seq_len, and a new --out"  # if every trial fails
    peak_of: Callable[[Sequence[int]], int | None] = lambda _: None  # planned bytes of ranks in one pass


class Selection:
    """A run folder and a strategy; `records` holds the records of its journal.

    A folder with a journal is resumed: trials that have ended are not run again, except those that failed for another
    reason than memory.

    Raises:
        RunFolderError: the folder was made with another model, other data or other settings.
    """

    def __init__(
        self,
        folder: RunFolder,
        started: RunStarted,
        strategy: Strategy,
        hooks: Hooks | None = None,
        options: LoopOptions | None = None,
    ) -> None:
        self.folder = folder
        self._strategy = strategy
        self._hooks = hooks or Hooks()
        self._options = options or LoopOptions()
        self._next_views = 0.0  # by the monotonic clock
        self._printed = 0  # notes of the strategy
        self.faults = ViewFaults()
        existing = folder.journal.read()
        if existing:
            require_same_run(folder, existing[0], started)
            continue_run(folder, existing, started)
        else:
            folder.journal.append(started)
        self.records = Records.of(started, existing)
        # The cause of a failure may have been removed since; a device's memory does not grow.
        self.records.outcomes = [outcome for outcome in self.records.outcomes if not _may_succeed_now(outcome)]

    def run(self, executor: Executor, on_adapter: Callable[[AdapterAnswer], None] = lambda _: None) -> Decision | None:
        """Run every arm that the strategy requests, then decide; None where the goal is the adapter.

        `on_adapter` is called once, between two rounds of arms, as soon as the first question is answered.

        Raises:
            AllTrialsFailedError: fewer than two ranks ended with a result, or the first trials all failed.
            InterruptedRun: a hook asked to stop; the journal holds what has finished.
        """
        try:
            while True:
                self.answer_adapter(on_adapter)
                trials = self.wanted()
                self._print_notes()
                if not trials:
                    break
                for outcome in executor.run(trials, self.base_loss):
                    self.keep(outcome)
                    if outcome.rank == 0:
                        break  # trials are judged against the base's loss, which is known now
        except InterruptedRun:
            self._write_views_so_far()
            raise
        return self.decide() if self._options.goal == "training-rank" else None

    def answer_adapter(self, on_adapter: Callable[[AdapterAnswer], None]) -> None:
        """Call `on_adapter` where the trials so far answer the first question and no record has the answer."""
        answer = self._strategy.adapter(History.of(self.records.outcomes))
        last = self.records.adapters[-1].answer if self.records.adapters else None
        if answer is None or (last and (last.margin, last.trained_id) == (answer.margin, answer.trained_id)):
            return  # not known yet, or recorded: a continued run may ask at another margin or top rank
        on_adapter(answer)

    def keep_adapter(self, answer: AdapterAnswer, handed_over: HandedOver, guard: GuardAnswer | None = None) -> None:
        """Journal the answer to the first question. The cost is that of the trials so far, or of the first answer."""
        first = self.records.adapters[0].trainings if self.records.adapters else trainings(self.records)
        record = AdapterRecorded(answer=answer, handed_over=handed_over, trainings=first, guard=guard)
        self.folder.journal.append(record)
        self.records.adapters.append(record)

    def wanted(self) -> list[Trial]:
        """The trials to run now; empty when the strategy requests no more."""
        fingerprint = self.records.started.fingerprint
        arms = self._strategy.ask(History.of(self.records.outcomes))
        return [Trial(trial_id=trial_id(fingerprint, arm), arm=arm) for arm in arms]

    def _print_notes(self) -> None:
        """Pass the strategy's new lines to the hooks."""
        notes: Sequence[str] = ()
        with self.faults.kept("the notes"):
            notes = self._strategy.notes(History.of(self.records.outcomes))
        for line in notes[self._printed :]:
            self._hooks.notice(line)
        self._printed = max(self._printed, len(notes))

    @property
    def base_loss(self) -> float | None:
        """The base's held-out loss, once it has been evaluated."""
        return next((trial.metrics.get("loss") for trial in self.records.finished() if trial.rank == 0), None)

    @property
    def listener(self) -> Listener:
        """What an executor reports to."""
        return _Recording(self.folder, self._hooks)

    def keep(self, outcome: TrialOutcome) -> None:
        """Journal an outcome, and write the report again if it is due.

        Raises:
            AllTrialsFailedError: the first trials all failed.
        """
        outcome = self._with_plan(outcome)
        self.folder.journal.append(outcome)
        self.records.outcomes.append(outcome)
        if time.monotonic() >= self._next_views:
            self._write_views_so_far()
        self._hooks.on_event(outcome)
        failed = [outcome for outcome in self.records.outcomes if isinstance(outcome, TrialFailed)]
        if len(failed) >= MAX_FAILED_AT_START and not self.records.finished():
            self._write_views_so_far()
            raise AllTrialsFailedError(f"the first {len(failed)} trials failed (the first: {failed[0].reason})")

    def decide(self) -> Decision | None:
        """The decision on the trials that the strategy takes as evidence; None where it has a fault, which `faults` keeps.

        Raises:
            DeviceMemoryError: every trial ran out of memory.
            AllTrialsFailedError: fewer than two ranks ended with a result.
        """
        trained = [outcome for outcome in self.records.outcomes if outcome.rank > 0]
        reasons = [outcome.reason for outcome in trained if not isinstance(outcome, TrialFinished)]
        first = f" (the first: {reasons[0]})" if reasons else ""
        if len(reasons) == len(trained):
            self._write_views_so_far()
            memory = all(isinstance(outcome, TrialFailed) and outcome.error == "out_of_memory" for outcome in trained)
            error = DeviceMemoryError if memory and trained else AllTrialsFailedError
            raise error(f"none of {len(reasons)} trials ended with a result{first}; {self._options.advice}")
        decision = None
        try:
            with self.faults.kept("the decision", but=(ResultsError,)):
                decision = decide_run(self.records, self._evidence())
        except ResultsError:
            self._write_views_so_far()
            raise AllTrialsFailedError(
                f"fewer than two ranks have a whole training: there is nothing to compare{first}; "
                f"{self._options.advice}, or a larger budget"
            ) from None
        return decision

    def compared_with(self, estimate: SelectionCost) -> str:
        """A line for a person: what the run took and what was estimated."""
        history = History.of(self.records.outcomes)
        finished = self.records.finished()
        steps = sum(steps_of(trial.arm, history) for trial in finished)
        seconds = sum(seconds_of(trial, history) for trial in finished)
        return took_line(estimate, steps / estimate.steps, seconds)

    def write_views(self, decision: Decision | None) -> None:
        with self.faults.kept("the report"):
            write_views(self.folder, self.records, decision, self._options.goal)

    def _write_views_so_far(self) -> None:
        """Write the report; with many trials it takes longer, so the next one waits in proportion."""
        started = time.monotonic()
        decision = None
        if self._options.goal == "training-rank":
            with self.faults.kept("the decision"):
                decision = decision_so_far(self.records, self._evidence())
        self.write_views(decision)
        ended = time.monotonic()
        self._next_views = ended + (ended - started) / MAX_VIEWS_SHARE

    def _evidence(self) -> Sequence[TrialOutcome]:
        """The outcomes that the strategy compares ranks by."""
        return self._strategy.evidence(History.of(self.records.outcomes))

    def _with_plan(self, outcome: TrialOutcome) -> TrialOutcome:
        """The outcome with the peak memory that was planned for it, where there is a plan."""
        if outcome.rank == 0 or outcome.arm.steps == 0 or isinstance(outcome, TrialCollapsed | TrialDiverged):
            return outcome
        if isinstance(outcome, TrialFinished):
            predicted = self._options.peak_of(outcome.pass_ranks or [outcome.rank])
            return outcome.model_copy(update={"predicted_peak_bytes": predicted})
        predicted = self._options.peak_of([outcome.rank])
        if predicted is None or outcome.error != "out_of_memory":
            return outcome
        return outcome.model_copy(update={"reason": f"{outcome.reason}; the plan said {size(predicted)}"})


class _Recording(Listener):
    """Journals each start and look, then passes every event on."""

    def __init__(self, folder: RunFolder, hooks: Hooks) -> None:
        self._folder, self._hooks = folder, hooks

    def on_event(self, event: Event) -> None:
        if isinstance(event, TrialStarted | TrialLook):
            self._folder.journal.append(event)
        self._hooks.on_event(event)

    def should_stop(self) -> bool:
        return self._hooks.should_stop()


def _may_succeed_now(outcome: TrialOutcome) -> bool:
    return isinstance(outcome, TrialFailed) and outcome.error != "out_of_memory"


def continue_run(folder: RunFolder, existing: Sequence[JournalRecord], started: RunStarted) -> None:
    """Journal the settings with which a run is continued, where they are not those that it had last."""
    before = settled_start(existing).settings
    names = [name for name in (*CONTINUABLE, "goal") if name in started.settings and name in before]
    changed = {name: started.settings[name] for name in names if started.settings[name] != before[name]}
    if "eval_items" in changed:
        items, data = started.evaluation_items, started.data
        folder.journal.append(RunContinued(settings=changed, evaluation_items=items, data=data))
    elif changed:
        folder.journal.append(RunContinued(settings=changed))


def require_same_run(folder: RunFolder, first: JournalRecord, started: RunStarted) -> None:
    """Refuse a folder that was made with another model, other data or other settings, and name them."""
    if not isinstance(first, RunStarted):
        raise RunFolderError(f"{folder.journal.path}: the first line is not the start of a run; give another --out")
    if first.fingerprint == started.fingerprint:
        return
    changed = settings_difference(first.settings, started.settings)
    if not changed:
        changed = ["the data, the model's files or the trainer have changed since"]
    raise made_with_others(folder, changed)
