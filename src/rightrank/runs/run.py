"""The whole job on one page: prepare, loop, finish. Every selection ends in `select`: of the command, of Python, of an own trainer, and the end
of a training.

A strategy requests arms, an executor runs them, and whatever happens goes through `Run` to the journal and the hooks.
The journal is the only state, so a run that was killed resumes where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import yaml

from rightrank.data.files import write_text
from rightrank.decision.records import Records, decide_run, settled_start
from rightrank.report.format import size
from rightrank.runs.executor import Asked, Executor, Plan
from rightrank.runs.finish import answer_early, finish, rescore
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import FailingAs, Hook, Hooks, Run, Started
from rightrank.runs.values import Selected
from rightrank.schema.decision import Decision
from rightrank.schema.errors import (
    AllTrialsFailedError,
    DeviceMemoryError,
    InterruptedRun,
    ModelError,
    ResultsError,
    RunFolderError,
    SettingsError,
)
from rightrank.schema.events import JournalRecord, RunContinued, RunStarted, RunStopped, SelectionPlanned
from rightrank.schema.settings import CONTINUABLE, SelectSettings, settings_of_identity
from rightrank.schema.trials import OUTCOMES, Trial, TrialFailed, TrialFinished, TrialLook, TrialOutcome, trial_id

MAX_EXTENSIONS = 3
MAX_FAILED_AT_START = 3  # trials that fail before any finishes: then the cause is no single arm


def select(request: Asked, folder: RunFolder, hooks: Sequence[Hook]) -> Selected:
    """Prepare, loop, finish; and again with what the answer asks for, as long as `extend`, memory and budget allow.

    What an interrupted run in `folder` has done is not done again.

    Raises:
        InputError: model, data, settings or folder can't be used.
        AllTrialsFailedError: fewer than two ranks ended with a result, or the first trials all failed.
        DeviceMemoryError: every trial ran out of memory.
        InterruptedRun: a hook asked to stop; the journal holds what has finished.
        HookError: a hook has a fault.
    """
    run, spent = opened(request, folder, Hooks(hooks)), None
    for extensions in range(MAX_EXTENSIONS + 1):
        begin(run)
        rescore(run)
        try:
            with run.plan.workplace(folder, run, run.records) as executor:
                loop(run, executor)
            decision = final_decision(run) if run.plan.settings.goal == "training-rank" else None
        except (AllTrialsFailedError, DeviceMemoryError, InterruptedRun) as stopped:
            run.on_event(RunStopped(reason=str(stopped)))
            raise
        selected = finish(run, decision)
        if selected.cost["trainings"] == spent or extensions == MAX_EXTENSIONS:
            break  # the budget is spent
        further, spent = _extended(request, run, selected), selected.cost["trainings"]
        if further is None:
            break
        run = further
    return selected


def opened(request: Asked, folder: RunFolder, hooks: Hooks, before: Plan | None = None) -> Run:
    """A run that begins or resumes: the journal is read, data and base are loaded, and nothing is written.

    A run of other settings whose function only raised or returned nothing usable is moved aside.
    Trials that have ended are not run again, except those that failed for another reason than memory.

    Raises:
        RunFolderError: the folder was made with another model, other data or other settings.
    """
    journal = folder.journal.read(hooks.notice)
    plan = request.plan(folder, journal, before)
    if _is_without_result(journal, plan.started):
        journal, plan = [], request.plan(folder, [], before)
        hooks.notice(f"the run in {folder.path} had other settings and no result; it was moved to {folder.set_aside()}")
    if journal:
        _require_same_run(folder, journal[0], plan.started)
    # The cause of a failure may have been removed since; a device's memory does not grow.
    kept = (record for record in journal if not isinstance(record, TrialFailed) or record.error == "out_of_memory")
    return Run(
        plan,
        folder,
        hooks,
        Records.of(plan.started, kept),
        _continued(journal, plan.started) if journal else plan.started,
    )


def begin(run: Run) -> None:
    """Tell the hooks, journal the start, or the settings with which the run continues, and say what is to come."""
    plan = run.plan
    run.hooks.on_start(Started(plan, run.folder, run.records.copy, run.on_event))
    for line in plan.notes:
        run.notice(line)
    if run.opening is not None:
        run.on_event(run.opening)
    settings = yaml.safe_dump(plan.started.settings, sort_keys=False, allow_unicode=True)
    write_text(run.folder.config, settings)
    cost = plan.strategy.cost()
    run.on_event(
        SelectionPlanned(
            started=plan.started,
            expected_trials=plan.strategy.expected_arms(),
            steps=plan.steps,
            expected_trainings=cost.expected,
            trainings_at_most=cost.maximum,
            outcomes=list(run.records.outcomes),
        )
    )


def _extended(request: Asked, run: Run, selected: Selected) -> Run | None:
    """The run with a larger top or the next learning rate; None where the answer asks for neither, or no memory has it."""
    settings, further = run.plan.settings, extended(run.plan.settings, selected)
    if further is None:
        return None
    try:
        wider = opened(request.extended(further), run.folder, run.hooks, run.plan)
    except (ModelError, SettingsError) as error:  # no matrix has that rank, or it fits no memory
        run.hooks.notice(f"not extended: {error}")
        return None
    if set(wider.plan.settings.ranks) == set(settings.ranks) and further.ranks != settings.ranks:
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
        fingerprint = run.plan.started.fingerprint
        trials = [
            Trial(trial_id=trial_id(fingerprint, arm), arm=arm) for arm in run.plan.strategy.ask(run.records.outcomes)
        ]
        notes = run.plan.strategy.trials(run.records.outcomes).notes
        for line in notes[told:]:
            run.notice(line)
        told = max(told, len(notes))
        if not trials:
            return
        base = next((trial for trial in run.records.finished() if trial.rank == 0), None)
        for outcome in executor.run(trials, None if base is None else base.metrics.get("loss")):
            run.on_event(_with_plan(run, outcome))
            failed = [trial for trial in run.records.outcomes if isinstance(trial, TrialFailed) and trial.rank > 0]
            # The base of a custom trainer may have a value although no training works.
            is_own = run.plan.started.is_own
            has_result = any(trial.rank > 0 or not is_own for trial in run.records.finished())
            if len(failed) >= MAX_FAILED_AT_START and not has_result:
                raise AllTrialsFailedError(f"the first {len(failed)} trials failed (the first: {failed[0].reason})")
            if outcome.rank == 0:
                break  # trials are judged against the base's loss, which is known now


def final_decision(run: Run) -> Decision:
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
            return with_base_note(decide_run(run.records), run.records)
    except ResultsError:
        raise AllTrialsFailedError(
            f"fewer than two ranks have a whole training: there is nothing to compare{first}; "
            f"{run.plan.advice}, or a larger budget"
        ) from None


def with_base_note(decision: Decision, records: Records) -> Decision:
    """Say in the decision of a custom trainer's run that no value of the base is among its evidence."""
    if not records.started.is_own or any(trial.rank == 0 for trial in records.finished()):
        return decision
    failed = next((trial for trial in records.outcomes if trial.rank == 0), None)
    why = "add 0 to the ranks" if failed is None or isinstance(failed, TrialFinished) else failed.reason
    return decision.model_copy(
        update={"sentence": f"{decision.sentence} The base was not measured, so no gain over it is shown ({why})."}
    )


def _with_plan(run: Run, outcome: TrialOutcome) -> TrialOutcome:
    """The outcome with the peak memory that was planned for it, where there is a plan."""
    if outcome.rank == 0 or outcome.arm.steps == 0:
        return outcome
    if isinstance(outcome, TrialFinished):
        predicted = run.plan.peak_of(outcome.pass_ranks or [outcome.rank])
        return outcome if predicted is None else outcome.model_copy(update={"predicted_peak_bytes": predicted})
    predicted = run.plan.peak_of([outcome.rank])
    if predicted is None or not isinstance(outcome, TrialFailed) or outcome.error != "out_of_memory":
        return outcome
    return outcome.model_copy(update={"reason": f"{outcome.reason}; the plan said {size(predicted)}"})


def _continued(journal: Sequence[JournalRecord], started: RunStarted) -> RunContinued | None:
    """The settings with which a run is continued, where they are not those that it had last."""
    before = settled_start(journal).settings
    names = [name for name in (*CONTINUABLE, "goal") if name in started.settings and name in before]
    changed = {name: started.settings[name] for name in names if started.settings[name] != before[name]}
    if "eval_items" in changed:
        return RunContinued(settings=changed, evaluation_items=started.evaluation_items, data=started.data)
    return RunContinued(settings=changed) if changed else None


def _is_without_result(journal: Sequence[JournalRecord], started: RunStarted) -> bool:
    """Whether the journal is of other settings, and of a custom function that never returned or reported anything usable."""
    first = journal[0] if journal else None
    if (
        not isinstance(first, RunStarted)
        or not first.is_own
        or first.is_end
        or first.fingerprint == started.fingerprint
    ):
        return False
    ended = [record for record in journal if isinstance(record, (TrialLook, *OUTCOMES))]
    return bool(ended) and all(isinstance(record, TrialFailed) for record in ended)


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
