"""The whole job on one page: prepare, run trials, finish. Every selection runs through `select`: from the command line, from Python, with a
custom trainer, and at the end of a training.

A strategy requests arms, an executor runs them, and all events pass through `Run` to the journal and the hooks.
The journal is the only state, so a run that was killed resumes where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from rightrank.data.files import write_text
from rightrank.decision.run import decide_run
from rightrank.report.format import format_bytes
from rightrank.runs.finish import export_provisional, finish_run
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import Hook, Hooks, Run
from rightrank.runs.selection import Executor, Prepare
from rightrank.runs.values import Selected
from rightrank.schema.decision import Decision
from rightrank.schema.errors import (
    AllTrialsFailedError,
    DeviceMemoryError,
    InterruptedRun,
    ResultsError,
    RunFolderError,
)
from rightrank.schema.events import (
    JournalRecord,
    Records,
    RunContinued,
    RunStarted,
    RunStopped,
    SelectionPlanned,
    get_effective_start,
)
from rightrank.schema.settings import CONTINUABLE_SETTINGS, select_identity_settings
from rightrank.schema.trials import (
    Trial,
    TrialFailed,
    TrialFinished,
    TrialOutcome,
    compute_trial_id,
)

MAX_FAILED_AT_START = 3  # if these fail and none finishes, the cause is not a single arm


def select(prepare: Prepare, folder: RunFolder, hooks: Sequence[Hook]) -> Selected:
    """Prepare, run trials and finish.

    Steps that an interrupted run in `folder` has completed are skipped.

    Raises:
        InputError: model, data, settings or folder can't be used.
        AllTrialsFailedError: fewer than two ranks have a result, or the first trials all failed.
        DeviceMemoryError: every trial ran out of memory.
        InterruptedRun: a hook asked to stop; the journal holds the finished trials.
        HookError: a hook failed.
    """
    run = open_run(prepare, folder, Hooks(hooks))
    start_run(run)
    try:
        with run.selection.open_executor(folder, run, run.records) as executor:
            run_trials(run, executor)
        first_reason = require_result(run)
        is_rank_requested = run.selection.settings.goal == "training-rank"
        decision = decide_training_rank(run, first_reason) if is_rank_requested else None
    except (AllTrialsFailedError, DeviceMemoryError, InterruptedRun) as error:
        run.on_event(RunStopped(reason=str(error)))
        raise
    return finish_run(run, decision)


def open_run(prepare: Prepare, folder: RunFolder, hooks: Hooks) -> Run:
    """Begin or resume a run: read the journal and load data and base. Write nothing.

    Trials that have ended are not run again, except those that failed for another reason than memory.

    Raises:
        RunFolderError: the folder was made with another model, other data or other settings.
    """
    journal = folder.journal.read(hooks.send_notice)
    selection = prepare(folder, journal)
    if journal:
        _require_same_run(folder, journal[0], selection.started)
    # A failed trial is run again, since its cause may have been removed. A device's memory does not grow.
    valid_records = (
        record for record in journal if not isinstance(record, TrialFailed) or record.error == "out_of_memory"
    )
    return Run(
        selection,
        folder,
        hooks,
        Records.from_journal(selection.started, valid_records),
        _find_changed_settings(journal, selection.started) if journal else selection.started,
    )


def start_run(run: Run) -> None:
    """Notify the hooks and journal the start, or the settings with which the run continues."""
    selection = run.selection
    run.hooks.on_start(run)
    for line in selection.notes:
        run.send_notice(line)
    if run.start_record is not None:
        run.on_event(run.start_record)
    settings = yaml.safe_dump(selection.started.settings, sort_keys=False, allow_unicode=True)
    write_text(run.folder.config, settings)
    cost = selection.strategy.estimate_cost()
    run.on_event(
        SelectionPlanned(
            started=selection.started,
            expected_trials=selection.strategy.estimate_arms(),
            steps=selection.steps,
            expected_trainings=cost.expected,
            trainings_at_most=cost.maximum,
            outcomes=list(run.records.outcomes),
        )
    )


def run_trials(run: Run, executor: Executor) -> None:
    """Run every arm that the strategy requests. Between rounds, export the adapter as soon as the deployment rank is known."""
    num_reported = 0
    while True:
        history = run.selection.strategy.replay_trials(run.records.outcomes)
        export_provisional(run, history.adapter)
        fingerprint = run.selection.started.fingerprint
        trials = [Trial(trial_id=compute_trial_id(fingerprint, arm), arm=arm) for arm in history.waiting]
        for line in history.notes[num_reported:]:
            run.send_notice(line)
        num_reported = max(num_reported, len(history.notes))
        if not trials:
            return
        base = next((trial for trial in run.records.list_finished() if trial.rank == 0), None)
        for outcome in executor.run(trials, None if base is None else base.metrics.get("loss")):
            run.on_event(_add_predicted_memory(run, outcome))
            failed = [trial for trial in run.records.outcomes if isinstance(trial, TrialFailed) and trial.rank > 0]
            # The base of a custom trainer may have a value although no training works.
            is_custom = run.selection.started.is_custom_trainer
            has_result = any(trial.rank > 0 or not is_custom for trial in run.records.list_finished())
            if len(failed) >= MAX_FAILED_AT_START and not has_result:
                raise AllTrialsFailedError(f"the first {len(failed)} trials failed (the first: {failed[0].reason})")
            if outcome.rank == 0:
                break  # the next trials are run with the base's loss, which is known now


def require_result(run: Run) -> str:
    """Raise an error if no trial, or no full training, ended with a result. Return why the first trial without one has none, in brackets."""
    trained = [outcome for outcome in run.records.outcomes if outcome.rank > 0]
    reasons = [outcome.reason for outcome in trained if not isinstance(outcome, TrialFinished)]
    first_reason = f" (the first: {reasons[0]})" if reasons else ""
    if trained and len(reasons) == len(trained):
        memory = all(isinstance(outcome, TrialFailed) and outcome.error == "out_of_memory" for outcome in trained)
        error = DeviceMemoryError if memory else AllTrialsFailedError
        raise error(f"none of {len(reasons)} trials ended with a result{first_reason}; {run.selection.advice}")
    if any(trial.arm.is_direct for trial in run.records.list_finished() if trial.rank > 0):
        return first_reason
    if reasons:
        raise AllTrialsFailedError(
            f"no training reached its last step{first_reason}; {run.selection.advice}, or a larger budget"
        )
    raise AllTrialsFailedError(
        "the budget ended before the first training did; the same command with a larger one continues"
    )


def decide_training_rank(run: Run, first_reason: str) -> Decision:
    """Decide on every full training in the folder, including those from before the run was continued."""
    try:
        return decide_run(run.records)
    except ResultsError:
        raise AllTrialsFailedError(
            f"fewer than two ranks have a full training, so there is nothing to compare{first_reason}; "
            f"{run.selection.advice}, or a larger budget"
        ) from None


def _add_predicted_memory(run: Run, outcome: TrialOutcome) -> TrialOutcome:
    """Return the outcome with the predicted peak memory, if there is a memory plan."""
    if outcome.rank == 0 or outcome.arm.steps == 0:
        return outcome
    if isinstance(outcome, TrialFinished):
        predicted = run.selection.predict_peak_bytes(outcome.pass_ranks or [outcome.rank])
        return outcome if predicted is None else outcome.model_copy(update={"predicted_peak_bytes": predicted})
    predicted = run.selection.predict_peak_bytes([outcome.rank])
    if predicted is None or not isinstance(outcome, TrialFailed) or outcome.error != "out_of_memory":
        return outcome
    return outcome.model_copy(
        update={"reason": f"{outcome.reason}; the memory plan predicted {format_bytes(predicted)}"}
    )


def _find_changed_settings(journal: Sequence[JournalRecord], started: RunStarted) -> RunContinued | None:
    """Return the settings with which a run continues; None if they are those that it had last."""
    previous = get_effective_start(journal).settings
    names = [name for name in (*CONTINUABLE_SETTINGS, "goal") if name in started.settings and name in previous]
    changed = {name: started.settings[name] for name in names if started.settings[name] != previous[name]}
    return RunContinued(settings=changed) if changed else None


def _require_same_run(folder: RunFolder, first: JournalRecord, started: RunStarted) -> None:
    """Refuse a folder that was made with another model, other data or other settings, and name the differences."""
    if not isinstance(first, RunStarted):
        raise RunFolderError(f"{folder.journal.path}: the first line is not the start of a run; give another --out")
    if first.fingerprint == started.fingerprint:
        return
    recorded = select_identity_settings(first.settings, {})
    requested = select_identity_settings(started.settings, first.settings)
    names = sorted(recorded.keys() | requested.keys())
    changed = [
        f"{name}: {recorded.get(name)!r} → {requested.get(name)!r}"
        for name in names
        if recorded.get(name) != requested.get(name)
    ]
    if not changed:
        changed = ["the data, the model's files or the trainer have changed since"]
    raise RunFolderError(
        f"{folder.path}: made with other settings ({'; '.join(changed)}); give the same settings to resume, or another --out"
    )
