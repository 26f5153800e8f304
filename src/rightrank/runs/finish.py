"""The export of the adapter into `adapter/`, from the first result on, with its values on the test split."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from rightrank.adapters.adapter_folders import BASE_FILE, CARD_IMAGES, CONFIG_FILE
from rightrank.data.files import UnreadableError, read_json_object, replace_folder
from rightrank.decision.run import (
    build_criterion,
    build_trained_answer,
    compute_test_difference,
    find_best_trial,
    prefer_direct_training,
)
from rightrank.report.answer import build_answers
from rightrank.runs.hook import Run
from rightrank.runs.values import Selected, SelectedRank
from rightrank.schema.decision import AdapterAnswer, Decision, ExportedAdapter
from rightrank.schema.events import AdapterRecorded, DecisionRecorded, Records
from rightrank.search.protocol import choose_adapter

CARD_FILES = ("README.md", *CARD_IMAGES)  # written to `adapter/` by the hook that writes the views


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
    """Return the training rank with the folder of its best adapter; None without a decision."""
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
            if (tested := run.selection.evaluate_test_split(trial, run.folder.find_trial_adapter(trial))) is not None:
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
    written = {BASE_FILE, *CARD_FILES, *(path.name for path in run.folder.path.glob("trials/*/*"))}
    user_files = sorted(path.name for path in target.iterdir() if path.name not in written) if target.is_dir() else []
    if user_files and (earlier_folder := run.folder.move_aside(target.name)) is not None:
        run.send_notice(
            f"{target} contained your own files ({', '.join(user_files)}) and was moved to {earlier_folder / target.name}"
        )


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
        return build_trained_answer(chosen, criterion, reference, plain)
    direct = [trial for trial in records.list_finished() if trial.rank > 0 and trial.arm.is_direct]
    sign = -1 if criterion.higher_is_better else 1
    best = min(direct, key=lambda trial: (-trial.rank, sign * trial.value))
    return build_trained_answer(best, criterion, outcomes=plain)


def _describe_exported_adapter(records: Records, answer: AdapterAnswer, saved: Path) -> ExportedAdapter:
    """Build the record of the exported adapter, with the ranks of its modules and its difference on the test split."""
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
