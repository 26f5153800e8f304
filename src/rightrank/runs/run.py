"""The whole job on one page: open, loop, finish.

A strategy requests arms, an executor runs them, and whatever happens goes through `Run.on_event` to the journal and the hooks.
The journal is the only state, so a run that was killed resumes where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from rightrank.decision.run import decide_run, settled_start
from rightrank.models.base_models import LoadedModel
from rightrank.report.format import size
from rightrank.runs.finish import answer_early, finish, rescore
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import Executor, FailingAs, Hooks, Run
from rightrank.runs.plugins import merged
from rightrank.runs.prepare import prepare, strategy_of
from rightrank.runs.values import Prepared, Request, Selected
from rightrank.schema.decision import Decision
from rightrank.schema.errors import AllTrialsFailedError, DeviceMemoryError, InterruptedRun, ResultsError
from rightrank.schema.events import JournalRecord, Listener, RunStarted, RunStopped
from rightrank.schema.trials import Trial, TrialFailed, TrialFinished, TrialOutcome, trial_id
from rightrank.train.loop import train_trials
from rightrank.train.pace import adapters_per_pass_for
from rightrank.train.runtime import Runtime
from rightrank.train.trial import TrialFolders

MAX_FAILED_AT_START = 3  # trials that fail before any finishes: then the cause is no single arm


def open_run(request: Request, folder: RunFolder, hooks: Hooks, loaded: LoadedModel | None = None) -> Run:
    """Data and base loaded, the journal read; nothing is written.

    `loaded` is the base, where a selection that differs in ranks and learning rates alone has loaded it.

    Raises:
        InputError: model, data, settings or folder can't be used.
    """
    journal = folder.journal.read(hooks.notice)
    resumed, notes = _resuming(request, journal), list[str]()
    prepared = prepare(resumed, folder.cache, notes.append, loaded)
    return Run(
        folder,
        hooks,
        prepared.started,
        prepared.settings,
        prepared.steps,
        strategy_of(prepared),
        lambda run: _executor_of(resumed, prepared, run),
        journal,
        notes,
        prepared,
    )


def _resuming(request: Request, journal: Sequence[JournalRecord]) -> Request:
    """The request with the settings under which the journal's run was begun; unchanged if the journal is empty."""
    first = journal[0] if journal else None
    if not isinstance(first, RunStarted):
        return request
    settings = request.settings
    if "dtype" not in request.settings.model_fields_set and "dtype" in first.settings:
        settings = settings.model_copy(update={"dtype": first.settings["dtype"]})  # what auto meant
    last = settled_start(journal).settings.get("eval_items")
    if isinstance(last, int) and last > (settings.eval_items or 0):
        settings = settings.model_copy(update={"eval_items": last})  # examples are added, and never taken away
    return replace(request, settings=settings, begun=first.settings)


def complete(run: Run) -> Selected:
    """Train what the strategy requests, decide, and hand over; what an interrupted run has done is not done again.

    Raises:
        AllTrialsFailedError: fewer than two ranks ended with a result, or the first trials all failed.
        DeviceMemoryError: every trial ran out of memory.
        InterruptedRun: a hook asked to stop; the journal holds what has finished.
        HookError: a hook has a fault.
    """
    run.hooks.on_prepared(run)
    run.begin()
    rescore(run)
    try:
        with run.executor(run) as executor:
            loop(run, executor)
        decision = decide(run) if run.settings.goal == "training-rank" else None
    except (AllTrialsFailedError, DeviceMemoryError, InterruptedRun) as stopped:
        run.on_event(RunStopped(reason=str(stopped)))
        raise
    return finish(run, decision)


def loop(run: Run, executor: Executor) -> None:
    """Run every arm that the strategy requests; between two rounds the first question is answered, as soon as it can be."""
    told = 0
    while True:
        answer_early(run)
        fingerprint = run.started.fingerprint
        trials = [Trial(trial_id=trial_id(fingerprint, arm), arm=arm) for arm in run.strategy.ask(run.records.outcomes)]
        notes = run.strategy.trials(run.records.outcomes).notes
        for line in notes[told:]:
            run.notice(line)
        told = max(told, len(notes))
        if not trials:
            return
        base = next((trial for trial in run.records.finished() if trial.rank == 0), None)
        for outcome in executor.run(trials, None if base is None else base.metrics.get("loss")):
            run.on_event(_with_plan(run, outcome))
            failed = [one for one in run.records.outcomes if isinstance(one, TrialFailed)]
            if len(failed) >= MAX_FAILED_AT_START and not run.records.finished():
                raise AllTrialsFailedError(f"the first {len(failed)} trials failed (the first: {failed[0].reason})")
            if outcome.rank == 0:
                break  # trials are judged against the base's loss, which is known now


def decide(run: Run) -> Decision:
    """The decision on every whole training of the folder, also those from before the run was continued."""
    trained = [outcome for outcome in run.records.outcomes if outcome.rank > 0]
    reasons = [outcome.reason for outcome in trained if not isinstance(outcome, TrialFinished)]
    first = f" (the first: {reasons[0]})" if reasons else ""
    if len(reasons) == len(trained):
        memory = all(isinstance(outcome, TrialFailed) and outcome.error == "out_of_memory" for outcome in trained)
        error = DeviceMemoryError if memory and trained else AllTrialsFailedError
        raise error(f"none of {len(reasons)} trials ended with a result{first}; {run.advice}")
    try:
        with FailingAs("the decision"):
            return decide_run(run.records)
    except ResultsError:
        raise AllTrialsFailedError(
            f"fewer than two ranks have a whole training: there is nothing to compare{first}; "
            f"{run.advice}, or a larger budget"
        ) from None


def _with_plan(run: Run, outcome: TrialOutcome) -> TrialOutcome:
    """The outcome with the peak memory that was planned for it, where there is a plan."""
    planned = run.prepared and run.prepared.planned
    if not planned or outcome.rank == 0 or outcome.arm.steps == 0:
        return outcome
    if isinstance(outcome, TrialFinished):
        predicted = planned.peak_of(outcome.pass_ranks or [outcome.rank])
        return outcome.model_copy(update={"predicted_peak_bytes": predicted})
    if isinstance(outcome, TrialFailed) and outcome.error == "out_of_memory":
        predicted = planned.peak_of([outcome.rank])
        told = "" if predicted is None else f"; the plan said {size(predicted)}"
        return outcome.model_copy(update={"reason": f"{outcome.reason}{told}"})
    return outcome


@contextmanager
def _executor_of(request: Request, prepared: Prepared, run: Run) -> Iterator[Executor]:
    """The executor that the settings name; workers run as long as the block.

    Raises:
        InputError: the settings don't fit the executor.
        RunError: no worker could start.
    """
    if request.settings.executor == "local":
        largest = prepared.planned.max_adapters_per_pass if prepared.planned else None
        yield LocalExecutor(prepared.runtime, run.folder, run, largest)
        return
    executors = merged(lambda plugin: plugin.executors)
    with executors[request.settings.executor](request, prepared, run) as executor:
        yield executor


@dataclass(slots=True)
class LocalExecutor:
    """The executor of a single process. Errors other than running out of memory propagate with their traceback."""

    _runtime: Runtime
    _folder: RunFolder
    _listener: Listener
    _max_adapters_per_pass: int | None = None  # that fit by the plan; None: not planned
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
        size = adapters_per_pass_for(self._runtime, arms, self._listener.notice, self._max_adapters_per_pass)
        yield from train_trials(self._runtime, trained, base_loss, self._folders, self._listener, size)

    def _folders(self, trial: Trial) -> TrialFolders:
        arm, folder = trial.arm, self._folder
        parent = arm.truncate_from or (arm.continue_from if arm.cut is not None else None)
        return TrialFolders(
            folder.checkpoint(trial.trial_id),
            folder.trial_adapter(trial.trial_id),
            None if arm.continue_from is None else folder.checkpoint(arm.continue_from),
            None if arm.truncate_from is None else folder.trial_adapter(arm.truncate_from),
            None if parent is None else folder.checkpoint(parent).with_suffix(".moments.safetensors"),
            folder.other_checkpoint(trial.trial_id),
            folder.answers(trial.trial_id),
        )
