"""The ends of a selection's door: `Run`, through which whatever happens is kept and told, `Hook`, which watches or takes part, and
`Executor`, which runs trials.

The core knows no hook by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import yaml

from rightrank.data.files import write_text
from rightrank.decision.run import Records, settled_start
from rightrank.runs.folder import RunFolder
from rightrank.runs.values import Plan, Prepared
from rightrank.schema.errors import RightrankError, RunError, RunFolderError, first_line
from rightrank.schema.events import (
    Event,
    GuardAnswer,
    Journaled,
    JournalRecord,
    Listener,
    RunContinued,
    RunStarted,
    SelectionPlanned,
)
from rightrank.schema.settings import CONTINUABLE, settings_of_identity
from rightrank.schema.trials import Trial, TrialFailed, TrialOutcome

if TYPE_CHECKING:
    from rightrank.runs.values import Selected
    from rightrank.schema.decision import AdapterAnswer


class Hook(Listener):
    """Something that watches a selection or takes part in it. A base class: every method does nothing.

    All methods run on the thread that calls `select_rank`, one hook after the other in the order of `callbacks`. A hook that
    raises ends the selection with one line that names it; what has finished is kept, and the same call resumes.

    Example::

        class Deadline(Hook):
            def should_stop(self) -> bool:
                return time.time() > END

        select_rank(model, data, "run", callbacks=[Deadline()])
    """

    ends_run = True
    """Whether a fault ends the selection at once. Else it continues without the hook, and ends with the line once all else is done."""

    def on_prepared(self, run: Run) -> None:
        """Called once, with data and base loaded and nothing written; an `InputError` refuses the selection."""

    def on_adapter(self, answer: AdapterAnswer, run: Run) -> tuple[AdapterAnswer, GuardAnswer | None] | None:
        """Called before an adapter is handed over. May return another one in its place, with the evidence."""

    def on_end(self, run: Run, selected: Selected) -> None:
        """Called last, with the adapter in place and the decision in the journal."""


class Hooks(Hook):
    """Several hooks as one."""

    def __init__(self, hooks: Sequence[Hook] = ()) -> None:
        self._hooks = list(hooks)
        self._faults: dict[Hook, HookError] = {}

    def on_prepared(self, run: Run) -> None:
        self._each(lambda hook: hook.on_prepared(run))

    def on_event(self, event: Event) -> None:
        self._each(lambda hook: hook.on_event(event))

    def should_stop(self) -> bool:
        asked: list[bool] = []
        self._each(lambda hook: asked.append(hook.should_stop()))
        return any(asked)

    def guarded(self, answer: AdapterAnswer, run: Run) -> tuple[AdapterAnswer, GuardAnswer | None]:
        """The answer that the hooks agree to, with the evidence of the last one that changed it or vouched for it."""
        found: list[tuple[AdapterAnswer, GuardAnswer | None]] = [(answer, None)]
        self._each(lambda hook: found.append(hook.on_adapter(found[-1][0], run) or found[-1]))
        return found[-1]

    def on_end(self, run: Run, selected: Selected) -> None:
        """Tell every hook.

        Raises:
            HookError: a hook that does not end a run by itself had a fault.
        """
        self._each(lambda hook: hook.on_end(run, selected))
        for fault in self._faults.values():
            raise fault

    def _each(self, call: Callable[[Hook], object]) -> None:
        for hook in self._hooks:
            if hook in self._faults:
                continue
            try:
                with FailingAs(type(hook).__name__):
                    call(hook)
            except HookError as fault:
                if hook.ends_run:
                    raise
                self._faults[hook] = fault


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


class HookError(RunError):
    """A hook, or another part without which a run is complete, has a fault."""


class FailingAs:  # no `contextmanager`, which lets a StopIteration pass that a RunError is raised from
    """A block whose fault is reported in one line that names it. Errors that are reported in one line already pass.

    Raises:
        HookError: the block raised another exception.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _at: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, RightrankError | OSError):
            return
        kept = "what has finished is kept, and the same call resumes"
        raise HookError(f"{self._name} failed ({described(error)}); {kept}") from error


def described(error: BaseException) -> str:
    """`KeyError: 'x'`, or the type alone where the error has no message."""
    kind, text = type(error).__name__, first_line(error)
    return kind if text == kind else f"{kind}: {text}"


@dataclass(eq=False)
class Run(Listener):
    """A selection in its folder.

    A folder with a journal is resumed: trials that have ended are not run again, except those that failed for another
    reason than memory.

    Raises:
        RunFolderError: the folder was made with another model, other data or other settings.
    """

    folder: RunFolder
    hooks: Hooks
    plan: Plan
    journal: Sequence[JournalRecord] = ()  # as it was before
    records: Records = field(init=False)  # of the journal, as it is now

    def __post_init__(self) -> None:
        self.started, self.settings, self.strategy = self.plan.started, self.plan.settings, self.plan.strategy
        if self.journal:
            _require_same_run(self.folder, self.journal[0], self.started)
        # The cause of a failure may have been removed since; a device's memory does not grow.
        kept = [one for one in self.journal if not isinstance(one, TrialFailed) or one.error == "out_of_memory"]
        self.records = Records.of(self.started, kept)

    @property
    def prepared(self) -> Prepared | None:
        """The plan, with base and data loaded; None: a custom trainer has them."""
        return self.plan if isinstance(self.plan, Prepared) else None

    def begin(self) -> None:
        """Journal the start, or the settings with which the run continues, and tell what is to come."""
        for line in self.plan.notes:
            self.notice(line)
        record = _continued(self.journal, self.started) if self.journal else self.started
        if record is not None:
            self.on_event(record)
        write_text(self.folder.config, yaml.safe_dump(self.started.settings, sort_keys=False, allow_unicode=True))
        cost = self.strategy.cost()
        self.on_event(
            SelectionPlanned(
                started=self.started,
                expected_trials=self.strategy.expected_arms(),
                steps=self.plan.steps,
                expected_trainings=cost.expected,
                trainings_at_most=cost.maximum,
                outcomes=list(self.records.outcomes),
            )
        )

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


def _continued(journal: Sequence[JournalRecord], started: RunStarted) -> RunContinued | None:
    """The settings with which a run is continued, where they are not those that it had last."""
    before = settled_start(journal).settings
    names = [name for name in (*CONTINUABLE, "goal") if name in started.settings and name in before]
    changed = {name: started.settings[name] for name in names if started.settings[name] != before[name]}
    if "eval_items" in changed:
        return RunContinued(settings=changed, evaluation_items=started.evaluation_items, data=started.data)
    return RunContinued(settings=changed) if changed else None


def _require_same_run(folder: RunFolder, first: JournalRecord, started: RunStarted) -> None:
    """Refuse a folder that was made with another model, other data or other settings, and name them."""
    if not isinstance(first, RunStarted):
        raise RunFolderError(f"{folder.journal.path}: the first line is not the start of a run; give another --out")
    if first.fingerprint == started.fingerprint:
        return
    before = settings_of_identity(first.settings, {})
    after = settings_of_identity(started.settings, first.settings)
    names = sorted(before.keys() | after.keys())
    changed = [
        f"{name}: {before.get(name)!r} → {after.get(name)!r}" for name in names if before.get(name) != after.get(name)
    ]
    if not changed:
        changed = ["the data, the model's files or the trainer have changed since"]
    raise RunFolderError(
        f"{folder.path}: made with other settings ({'; '.join(changed)}); give the same settings to resume, or another --out"
    )
