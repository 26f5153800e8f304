"""The whole job: begin or resume, run trials, finish. Every selection runs through `select`: from the command line, from Python, and with a
custom trainer.

A strategy requests arms, an executor runs them, and all events pass through `Run` to the journal and the hooks, which watch a run and can
stop it; the core knows none of them by name.
The journal is the only state, so a run that was killed resumes where it stopped. The adapter is exported into `adapter/` from the first
result on, with its values on the test split.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType

import yaml

from rightrank.adapters.adapter_folders import BASE_FILE, CONFIG_FILE
from rightrank.data.files import UnreadableError, read_json_object, replace_folder, write_text
from rightrank.decision.run_answers import (
    build_criterion,
    build_trained_answer,
    compute_test_difference,
    decide_run,
    find_best_trial,
    prefer_direct_training,
)
from rightrank.report.answer import Answers, build_answers
from rightrank.runs.folder import RunFolder
from rightrank.runs.selection import Executor, Prepare, PreparedSelection
from rightrank.schema.errors import (
    AllTrialsFailedError,
    DeviceMemoryError,
    InterruptedRun,
    ResultsError,
    RightrankError,
    RunError,
    RunFolderError,
    describe_error,
    log_traceback,
)
from rightrank.schema.events import (
    AdapterRecorded,
    AnyJournalRecord,
    DecisionRecorded,
    Event,
    JournalRecord,
    Listener,
    Records,
    RunContinued,
    RunStarted,
    RunStopped,
    SelectionPlanned,
    get_effective_start,
)
from rightrank.schema.results import AdapterAnswer, Decision, ExportedAdapter
from rightrank.schema.settings import CONTINUABLE_SETTINGS, select_identity_settings
from rightrank.schema.trials import (
    Trial,
    TrialFailed,
    TrialFinished,
    compute_trial_id,
)
from rightrank.search.protocol import choose_adapter


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
        from rightrank.report.answer import format_screen

        adapter = None if self.adapter is None else self.adapter.path
        return format_screen(self.answers, self.run, adapter, self.report, shutil.get_terminal_size((80, 24)).columns)


class Hook(Listener):
    """A base class for objects that watch a selection and can stop it. Every method does nothing by default.

    All methods run on the thread that calls `select_rank`, one hook after the other in the order of `callbacks`. If a hook raises an
    error, a notice names the hook, the selection continues without it, and ends with the error when the adapter is exported.

    Example::

        class Deadline(Hook):
            def should_stop(self) -> bool:
                return time.time() > END

        select_rank(model, data, "run", callbacks=[Deadline()])
    """

    def on_start(self, run: Run) -> None:
        """Handle the start, when data and base are loaded and nothing is written yet. An `InputError` refuses the selection.

        `run.selection`, `run.folder` and `run.records` describe the run; hooks read them. `run.on_event` passes an event to all hooks, and to
        the journal if it is a record.
        """

    def on_end(self, selected: Selected) -> None:
        """Handle the end, when the adapter is exported and the decision is in the journal."""


class Hooks(Hook):
    """Several hooks that act as one."""

    def __init__(self, hooks: Sequence[Hook] = ()) -> None:
        self._hooks = list(hooks)
        self._faults: dict[Hook, RunError] = {}

    def on_start(self, run: Run) -> None:
        self._call_each(lambda hook: hook.on_start(run))

    def on_event(self, event: Event) -> None:
        self._call_each(lambda hook: hook.on_event(event))

    def should_stop(self) -> bool:
        requests: list[bool] = []
        self._call_each(lambda hook: requests.append(hook.should_stop()))
        return any(requests)

    def on_end(self, selected: Selected) -> None:
        """Notify every hook.

        Raises:
            RunError: a hook failed earlier.
        """
        self._call_each(lambda hook: hook.on_end(selected))
        for fault in self._faults.values():
            raise fault

    def _call_each(self, call: Callable[[Hook], object]) -> None:
        for hook in self._hooks:
            if hook not in self._faults:
                with ExitStack() as stack:
                    stack.push(partial(self._handle_error, hook))
                    call(hook)

    def _handle_error(
        self, hook: Hook, _kind: type[BaseException] | None, error: BaseException | None, _at: TracebackType | None
    ) -> bool:
        """Describe an error of a hook in one line that names it, and return whether the selection continues without the hook.

        Errors that already have such a line end the selection.
        """
        if not isinstance(error, Exception) or isinstance(error, RightrankError | OSError):
            return False
        log_traceback(error)
        self._faults[hook] = RunError(
            f"{type(hook).__name__} failed ({describe_error(error)}); finished trials are kept, and the same call resumes"
        )
        self.send_notice(f"{type(hook).__name__} failed ({describe_error(error)}); the selection continues without it")
        return True


@dataclass(frozen=True, eq=False)
class Run(Listener):
    """A run: the prepared selection, its folder, and the records so far. Events are journaled here and passed to the hooks."""

    selection: PreparedSelection
    folder: RunFolder
    hooks: Hooks
    records: Records
    # The first record, or the settings with which the run continues; None if they are unchanged.
    start_record: RunStarted | RunContinued | None

    def on_event(self, event: Event) -> None:
        """Journal the event if it is a record, and pass it to the hooks."""
        if isinstance(event, AnyJournalRecord):
            self.folder.journal.append(event)
            self.records.add(event)
        self.hooks.on_event(event)

    def should_stop(self) -> bool:
        return self.hooks.should_stop()


CARD_FILE = "README.md"  # written to `adapter/` by the hook that writes the views
MAX_FAILED_AT_START = 3  # if these fail and none finishes, the cause is not a single arm


def select(prepare: Prepare, folder: RunFolder, hooks: Sequence[Hook]) -> Selected:
    """Prepare, run trials and finish.

    Steps that an interrupted run in `folder` has completed are skipped.

    Raises:
        InputError: model, data, settings or folder can't be used.
        AllTrialsFailedError: fewer than two ranks have a result, or the first trials all failed.
        DeviceMemoryError: every trial ran out of memory.
        InterruptedRun: a hook asked to stop; the journal holds the finished trials.
        RunError: a hook failed.
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
            run.on_event(outcome)
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
    raise AllTrialsFailedError(
        f"no training reached its last step{first_reason}; the same command with a larger budget continues, or {run.selection.advice}"
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


def export_provisional(run: Run, answer: AdapterAnswer | None) -> None:
    """Export the adapter of the deployment rank before the training rank is decided, if the trials so far give a new one."""
    last = run.records.adapters[-1].answer if run.records.adapters else None
    if answer is not None and run.selection.settings.goal != "best-adapter":
        answer = _prefer_longer_training(run.records, answer)
    if answer is None or (last and (last.margin, last.trained_id) == (answer.margin, answer.trained_id)):
        return  # unknown so far, or recorded; a continued run may have another margin or top rank
    if run.selection.base_identity is None:
        return  # a custom trainer's adapter is exported at the end
    if not run.selection.settings.has_workers:  # while workers use the base, this process evaluates nothing
        _evaluate_test_split(run, [answer.trial_id, answer.reference_id])
    export_adapter(run, answer)
    if run.selection.settings.goal == "adapter":
        return  # the final screen follows and says the same
    for text in (f"adapter: {answer.sentence} It is in {run.folder.adapter}.", *answer.notes):
        run.send_notice(text)


def _prefer_longer_training(records: Records, answer: AdapterAnswer) -> AdapterAnswer:
    """Return the answer of a longer training that is better, which goal "best-adapter" made before another goal continues the run."""
    trained, criterion = records.by_id[answer.trained_id], build_criterion(records)
    sign = -1 if criterion.higher_is_better else 1
    longer = next(
        (
            trial
            for trial in records.list_finished()
            if (trial.rank, trial.learning_rate, trial.seed) == (trained.rank, trained.learning_rate, trained.seed)
            if trial.arm.is_direct and trial.steps > trained.steps and sign * trial.value < sign * trained.value
        ),
        None,
    )
    if longer is None:
        return answer
    last = records.adapters[-1].answer if records.adapters else None
    if last is not None and (last.margin, last.trained_id) == (answer.margin, longer.trial_id):
        return last
    return choose_adapter(records.outcomes, criterion, longer.trial_id) or answer


def finish_run(run: Run, decision: Decision | None) -> Selected:
    """Evaluate on the test split and export the adapter. `decision` is None if the goal is the adapter alone.

    Steps that an interrupted run has completed are skipped.
    """
    records, folder = run.records, run.folder
    answer = _choose_final_adapter(run, decision)
    shown = [trial.trial_id for trial in records.list_finished() if trial.rank == 0 and trial.arm.is_direct]
    shown += [answer.trial_id, answer.reference_id]
    if decision is not None:
        ranks = (decision.recommended_rank, decision.reference_rank)
        shown += [find_best_trial(records, decision, rank).trial_id for rank in ranks]
    _evaluate_test_split(run, shown)
    saved = export_adapter(run, answer)
    if decision is not None:
        decision = decision.model_copy(update={"adapter_sentence": answer.sentence if saved else None})
        run.on_event(DecisionRecorded(decision=decision, adapter_trial_id=answer.trial_id))
    selected = Selected(
        folder.path,
        SelectedRank(records.adapters[-1].handed_over.rank, answer.sentence, folder.adapter) if saved else None,
        _select_training_rank(run, decision),
        folder.report,
        build_answers(records, decision, run.selection.settings.goal, str(folder.path)),
    )
    run.hooks.on_end(selected)
    for working in (folder.cache, folder.path / "checkpoints") if run.selection.owns_working_folders else ():
        shutil.rmtree(working, ignore_errors=True)
    return selected


def _select_training_rank(run: Run, decision: Decision | None) -> SelectedRank | None:
    if decision is None:
        return None
    path = run.folder.get_trial_folder(find_best_trial(run.records, decision, decision.recommended_rank).trial_id)
    has_files = path.is_dir() and any(path.iterdir())
    return SelectedRank(decision.rank, decision.sentence, path if has_files else None)


def _evaluate_test_split(run: Run, trial_ids: Iterable[str]) -> None:
    """Evaluate each trial once per run on the test split; a custom trainer has none."""
    for trial_id in trial_ids if run.selection.base_identity is not None else ():
        if all(test.trial_id != trial_id for test in run.records.tests):
            trial = run.records.by_id[trial_id]
            adapter = None if trial.rank == 0 else run.folder.require_trial_adapter(trial_id)
            if (tested := run.selection.evaluate_test_split(trial, adapter)) is not None:
                run.on_event(tested)


def export_adapter(run: Run, answer: AdapterAnswer) -> bool:
    """Copy the chosen adapter to `adapter/` and record it. Return False if a custom trainer saved no files.

    The recorded cost is that of the trials so far, or of the first export.
    """
    saved, target = run.folder.require_trial_adapter(answer.trial_id), run.folder.adapter
    files = sorted(path for path in saved.iterdir() if path.is_file())
    if not files:
        return False
    exported, exports = _describe_exported_adapter(run.records, answer, saved), run.records.adapters
    is_new = not exports or (exports[-1].answer, exports[-1].handed_over) != (answer, exported)
    if is_new or not target.is_dir():
        _move_user_files(run)
        with replace_folder(target) as temporary:
            for path in files:
                shutil.copy2(path, temporary / path.name)
            if (identity := run.selection.base_identity) is not None:
                (temporary / BASE_FILE).write_bytes(identity)
    if is_new:
        cost = exports[0].trainings if exports else run.records.count_trainings()
        run.on_event(AdapterRecorded(answer=answer, handed_over=exported, trainings=cost))
    return True


def _move_user_files(run: Run) -> None:
    """Move an existing adapter folder aside if it holds files that no run wrote, such as a conversion."""
    target = run.folder.adapter
    written = {BASE_FILE, CARD_FILE, *(path.name for path in run.folder.path.glob("trials/*/*"))}
    user_files = sorted(path.name for path in target.iterdir() if path.name not in written) if target.is_dir() else []
    if user_files:
        names = (target.with_name(f"{target.name}-{number}") for number in count(1))
        moved = target.rename(next(path for path in names if not path.exists()))
        run.send_notice(f"{target} contained your own files ({', '.join(user_files)}) and was moved to {moved}")


def _choose_final_adapter(run: Run, decision: Decision | None) -> AdapterAnswer:
    """Choose the adapter that is exported at the end of a run.

    It is the recorded one, or the smallest one among the candidates if a budget ended the run early, or else the best trained
    adapter. A direct training at a lower rank replaces it if it is better.
    """
    records = run.records
    criterion, plain = build_criterion(records), records.outcomes
    # A process without a base exports nothing early, so its recorded answer comes from an earlier call with other settings.
    is_recorded = bool(records.adapters) and run.selection.base_identity is not None
    answer = records.adapters[-1].answer if is_recorded else choose_adapter(plain, criterion)
    if answer is not None:
        return prefer_direct_training(answer, plain, criterion) or answer
    if decision is not None:
        ranks = (decision.recommended_rank, decision.reference_rank)
        chosen, reference = (find_best_trial(records, decision, rank) for rank in ranks)
    else:
        direct = [trial for trial in records.list_finished() if trial.rank > 0 and trial.arm.is_direct]
        sign = -1 if criterion.higher_is_better else 1
        chosen = reference = min(direct, key=lambda trial: (-trial.rank, sign * trial.value))
    return build_trained_answer(chosen, criterion, reference, plain)


def _describe_exported_adapter(records: Records, answer: AdapterAnswer, saved: Path) -> ExportedAdapter:
    tests = {test.trial_id: test for test in records.tests}
    test = compute_test_difference(tests.get(answer.trial_id), tests.get(answer.reference_id), build_criterion(records))
    try:
        config = read_json_object(saved / CONFIG_FILE)
    except UnreadableError:  # a custom trainer may write no configuration
        config = {}
    pattern = config.get("rank_pattern")
    of_modules = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    ranks = [answer.rank, *(rank for rank in of_modules if isinstance(rank, int))]
    return ExportedAdapter(
        **answer.model_dump(include={*ExportedAdapter.model_fields}),
        min_module_rank=min(ranks),
        max_module_rank=max(ranks),
        reference_adapter=f"trials/{answer.reference_id}",
        test_difference=test and test[0],
        test_difference_high=test and test[1],
    )
