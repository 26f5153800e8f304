"""The whole job on one page: prepare, loop, finish. Every selection ends in `select`: of the command, of Python, of an own trainer, and the end
of a training.

A strategy requests arms, an executor runs them, and whatever happens goes through `Run.on_event` to the journal and the hooks.
The journal is the only state, so a run that was killed resumes where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

from rightrank.decision.run import decide_run
from rightrank.report.format import size
from rightrank.runs.finish import answer_early, finish, rescore
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import Executor, FailingAs, Hook, Hooks, Run
from rightrank.runs.plugins import merged
from rightrank.runs.values import Asked, Plan, Prepared, Selected
from rightrank.schema.decision import Decision
from rightrank.schema.errors import (
    AllTrialsFailedError,
    DeviceMemoryError,
    InterruptedRun,
    ModelError,
    ResultsError,
    SettingsError,
)
from rightrank.schema.events import Listener, RunStopped
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Trial, TrialFailed, TrialFinished, TrialOutcome, trial_id
from rightrank.train.loop import train_trials
from rightrank.train.pace import adapters_per_pass_for
from rightrank.train.runtime import Runtime
from rightrank.train.trial import TrialFolders

MAX_EXTENSIONS = 3
MAX_FAILED_AT_START = 3  # trials that fail before any finishes: then the cause is no single arm


Workplace: TypeAlias = Callable[
    [Run], AbstractContextManager[Executor]
]  # an executor, within whose context workers run


def select(request: Asked, folder: RunFolder, hooks: Sequence[Hook], workplace: Workplace | None = None) -> Selected:
    """Prepare, loop, finish; and again with what the answer asks for, as long as `extend`, memory and budget allow.

    What an interrupted run in `folder` has done is not done again.

    Args:
        workplace: Where trials run; None for the one that the settings name.

    Raises:
        InputError: model, data, settings or folder can't be used.
        AllTrialsFailedError: fewer than two ranks ended with a result, or the first trials all failed.
        DeviceMemoryError: every trial ran out of memory.
        InterruptedRun: a hook asked to stop; the journal holds what has finished.
        HookError: a hook has a fault.
    """
    told, place = Hooks(hooks), workplace or _executor_of
    run = _opened(request, folder, told)
    selected = _complete(run, place)
    for _ in range(MAX_EXTENSIONS):
        spent, further = selected.cost["trainings"], _extended(request, run, selected)
        if further is None:
            break
        run = further
        selected = _complete(run, place)
        if selected.cost["trainings"] == spent:
            break  # the budget is spent
    return selected


def _opened(request: Asked, folder: RunFolder, hooks: Hooks, before: Plan | None = None) -> Run:
    """The journal is read, data and base are loaded; nothing is written."""
    journal = folder.journal.read(hooks.notice)
    return Run(folder, hooks, request.plan(folder, journal, before), journal)


def _complete(run: Run, workplace: Workplace) -> Selected:
    """Train what the strategy requests, decide, and hand over."""
    run.hooks.on_prepared(run)
    run.begin()
    rescore(run)
    try:
        with workplace(run) as executor:
            loop(run, executor)
        decision = decide(run) if run.settings.goal == "training-rank" else None
    except (AllTrialsFailedError, DeviceMemoryError, InterruptedRun) as stopped:
        run.on_event(RunStopped(reason=str(stopped)))
        raise
    return finish(run, decision)


def _extended(request: Asked, run: Run, selected: Selected) -> Run | None:
    """The run with a larger top or the next learning rate; None where the answer asks for neither, or no memory has it."""
    settings, further = run.settings, extended(run.settings, selected)
    if further is None:
        return None
    try:
        wider = _opened(request.extended(further), run.folder, run.hooks, run.plan)
    except (ModelError, SettingsError) as error:  # no matrix has that rank, or it fits no memory
        run.hooks.notice(f"not extended: {error}")
        return None
    if set(wider.settings.ranks) == set(settings.ranks) and further.ranks != settings.ranks:
        return None  # the next rank does not fit the memory
    said = selected.decided or (selected.answers.adapter and selected.answers.adapter.answer)
    why = said.sentence if said else None
    rank = next(iter(sorted(set(further.ranks) - set(settings.ranks))), None)
    rate = next(iter(sorted(set(further.learning_rates) - set(settings.learning_rates))), 0.0)
    what = f"rank {rank}" if rank is not None else f"learning rate {rate:.3g}"
    return replace(wider, plan=replace(wider.plan, notes=(*wider.plan.notes, f"extending: {why} Adding {what}.")))


def extended(settings: SelectSettings, selected: Selected) -> SelectSettings | None:
    """The settings with the rank above, or the learning rate beyond the edge; None where nothing is to be extended."""
    if not (settings.budget_hours is not None if settings.extend is None else settings.extend):
        return None
    adapter = selected.answers.adapter
    if adapter is not None and adapter.answer.keeps_the_top:
        return settings.model_copy(update={"ranks": (*settings.ranks, 2 * max(settings.ranks))})
    decision = selected.decided
    if decision is None or not (decision.verdict == "rising" or "lr_edge" in decision.flags):
        return None
    wanted = next((run for run in decision.next_runs if run.action in ("rank", "rates")), None)
    if wanted is None:
        return None
    name = "ranks" if wanted.action == "rank" else "learning_rates"
    both = tuple(sorted({*getattr(settings, name), *getattr(wanted, name)}))
    further = settings.model_copy(update={name: both})
    return None if further == settings else further


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
        raise error(f"none of {len(reasons)} trials ended with a result{first}; {run.plan.advice}")
    try:
        with FailingAs("the decision"):
            return decide_run(run.records)
    except ResultsError:
        raise AllTrialsFailedError(
            f"fewer than two ranks have a whole training: there is nothing to compare{first}; "
            f"{run.plan.advice}, or a larger budget"
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
def _executor_of(run: Run) -> Iterator[Executor]:
    """The executor that the settings name; workers run as long as the block.

    Raises:
        InputError: the settings don't fit the executor.
        RunError: no worker could start.
    """
    prepared = run.plan
    assert isinstance(prepared, Prepared)
    if prepared.settings.executor == "local":
        largest = prepared.planned.max_adapters_per_pass if prepared.planned else None
        yield LocalExecutor(prepared.runtime, run.folder, run, largest)
        return
    executors = merged(lambda plugin: plugin.executors)
    with executors[prepared.settings.executor](prepared.request, prepared, run) as executor:
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
