"""The hand-over: `adapter/` holds the answer to the first question from the first answer on, with its values on the test split.

A run continued with more validation examples: adapters that exist are scored on all of them, and nothing is trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from rightrank.data.files import UnreadableError, read_json_object, replacing_folder
from rightrank.decision.adapter import adapter_answer, improved_by_training, test_difference, trained_answer
from rightrank.decision.next_run import next_commands
from rightrank.decision.records import Records, best_trial, compared, criterion_of, trainings
from rightrank.models.places import BASE_FILE, CONFIG_FILE, WEIGHTS_FILE
from rightrank.report.html import CURVE, PICTURE
from rightrank.runs.hook import FailingAs, Finished, Run
from rightrank.runs.values import Answer, Selected, answers
from rightrank.schema.decision import AdapterAnswer, Decision, HandedOver
from rightrank.schema.errors import AllTrialsFailedError, ModelError
from rightrank.schema.events import AdapterRecorded, DecisionRecorded

CARD_FILES = ("README.md", PICTURE, CURVE)  # in `adapter/`, by the hook that writes the views


def answer_early(run: Run) -> None:
    """Hand over the answer to the first question while the second is open, where the trials so far give one that is new."""
    answer = run.plan.strategy.trials(run.records.outcomes).adapter
    last = run.records.adapters[-1].answer if run.records.adapters else None
    if answer is None or (last and (last.margin, last.trained_id) == (answer.margin, answer.trained_id)):
        return  # not known yet, or recorded: a continued run may ask at another margin or top rank
    if run.plan.base_identity is None:
        return  # a custom trainer's adapter is handed over at the end
    if run.plan.settings.executor == "local":  # while workers have the base, nothing is evaluated here
        answer = run.hooks.agreed(answer, run.records.copy)
        _read_test_split(run, [answer.trial_id, answer.reference_id])
    hand_over(run, answer)
    run.notice(f"adapter: {answer.sentence} It is in {run.folder.adapter}.")
    for note in answer.notes:
        run.notice(note)


def finish(run: Run, decision: Decision | None) -> Selected:
    """Evaluate on the test split, and hand over. `decision` is None where only the adapter was asked for.

    What an interrupted run has done of this already is not done again.
    """
    records, folder = run.records, run.folder
    answer = run.hooks.agreed(_final_answer(run, decision), run.records.copy)
    shown = [trial.trial_id for trial in records.finished() if trial.rank == 0]
    shown += [answer.trial_id, answer.reference_id]
    if decision is not None:
        ranks = (decision.rank_at_hand, decision.reference_rank)
        shown += [best_trial(records, decision, rank).trial_id for rank in ranks]
    _read_test_split(run, shown)
    saved = hand_over(run, answer)
    if decision is not None:
        decision = decision.model_copy(update={"adapter_sentence": answer.sentence if saved else None})
        run.on_event(DecisionRecorded(decision=decision, adapter_trial_id=answer.trial_id))
    with FailingAs("the answer"):
        final_answers = answers(records, decision, run.plan.settings.goal)
        selected = Selected(
            folder.path,
            Answer(records.adapters[-1].handed_over.rank, answer.sentence, folder.adapter) if saved else None,
            _training(run, decision),
            folder.report,
            final_answers,
            next_commands(records.started, final_answers.next_runs, str(folder.path)),
            compared(records),
        )
    run.hooks.on_end(Finished(selected, folder, records.copy()))
    for working in (folder.cache, folder.path / "checkpoints") if run.plan.owns_working_folders else ():
        shutil.rmtree(working, ignore_errors=True)
    return selected


def _training(run: Run, decision: Decision | None) -> Answer | None:
    if decision is None:
        return None
    path = run.folder.trial_adapter(best_trial(run.records, decision, decision.rank_at_hand).trial_id)
    has_files = path.is_dir() and any(path.iterdir())
    return Answer(decision.rank, decision.sentence, path if has_files else None)


def _read_test_split(run: Run, trial_ids: Iterable[str]) -> None:
    """Evaluate trials on the test split, each once in a run; a custom trainer has none."""
    for trial_id in trial_ids if run.plan.base_identity is not None else ():
        if all(test.trial_id != trial_id for test in run.records.tests):
            trial = run.records.by_id[trial_id]
            if (tested := run.plan.tested(trial, run.folder.adapter_of(trial))) is not None:
                run.on_event(tested)


def hand_over(run: Run, answer: AdapterAnswer) -> bool:
    """Make `adapter/` the answer to the first question, and record it. False where a custom trainer saved nothing.

    The recorded cost is that of the trials so far, or of the first answer.
    """
    saved, target = run.folder.finished_adapter(answer.trial_id), run.folder.adapter
    files = sorted(path for path in saved.iterdir() if path.is_file())
    if not files:
        return False
    handed_over, known = _handed_over(run.records, answer, saved), run.records.adapters
    is_new = not known or (known[-1].answer, known[-1].handed_over) != (answer, handed_over)
    if is_new or not target.is_dir():
        _require_loadable(saved)
        _keep_own_files(run)
        with replacing_folder(target) as temporary:
            for path in files:
                shutil.copy2(path, temporary / path.name)
            if (identity := run.plan.base_identity) is not None:
                (temporary / BASE_FILE).write_bytes(identity)
    if is_new:
        cost = known[0].trainings if known else trainings(run.records)
        run.on_event(AdapterRecorded(answer=answer, handed_over=handed_over, trainings=cost))
    return True


def _require_loadable(folder: Path) -> None:
    """Load a LoRA adapter by PEFT; a custom trainer may save files of another kind, which are handed over as they are.

    Raises:
        ModelError: PEFT refuses it.
    """
    if not all((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        return
    from rightrank.models.adapter_files import open_adapter  # these bring torch, which a trainer may not need
    from rightrank.models.loading import require_loadable

    try:
        adapter = open_adapter(folder)
    except ModelError:
        return
    require_loadable(adapter)


def _keep_own_files(run: Run) -> None:
    """Move an adapter that is to be replaced aside where it holds files that no run wrote, such as a conversion."""
    target = run.folder.adapter
    written = {BASE_FILE, *CARD_FILES, *(path.name for path in run.folder.path.glob("trials/*/*"))}
    own = sorted(path.name for path in target.iterdir() if path.name not in written) if target.is_dir() else []
    if own and (aside := run.folder.set_aside([target.name])) is not None:
        run.notice(f"{target} held files of your own ({', '.join(own)}) and was moved to {aside / target.name}")


def _require_loadable(folder: Path) -> None:
    """Load a LoRA adapter by PEFT; a custom trainer may save files of another kind, which are handed over as they are.

    Raises:
        ModelError: PEFT refuses it.
    """
    if not all((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        return
    from rightrank.models.adapter_files import open_adapter  # these bring torch, which a trainer may not need
    from rightrank.models.loading import require_loadable

    try:
        adapter = open_adapter(folder)
    except ModelError:
        return
    require_loadable(adapter)


def _final_answer(run: Run, decision: Decision | None) -> AdapterAnswer:
    """The answer to the first question at the end of a run.

    It is the recorded one, or one from the candidates that a budget left, or the best trained adapter. A direct training of
    the second question takes its place where it is better.
    """
    records = run.records
    criterion, plain = criterion_of(records), records.outcomes
    # Without a base in this process no answer was recorded early, and the recorded one is of an earlier call with other settings.
    is_recorded = bool(records.adapters) and run.plan.base_identity is not None
    known = records.adapters[-1].answer if is_recorded else adapter_answer(plain, criterion)
    if known is not None:
        return improved_by_training(known, plain, criterion) or known
    if decision is not None:
        ranks = (decision.rank_at_hand, decision.reference_rank)
        chosen, reference = (best_trial(records, decision, rank) for rank in ranks)
        return trained_answer(chosen, criterion, reference)
    direct = [trial for trial in records.finished() if trial.rank > 0 and trial.arm.is_direct]
    if not direct:
        raise AllTrialsFailedError("no training at the top rank ended: give a larger budget, or lower learning rates")
    sign = -1 if criterion.higher_is_better else 1
    return trained_answer(min(direct, key=lambda trial: (-trial.rank, sign * trial.value)), criterion)


def _handed_over(records: Records, answer: AdapterAnswer, saved: Path) -> HandedOver:
    tests = {test.trial_id: test for test in records.tests}
    test = test_difference(tests.get(answer.trial_id), tests.get(answer.reference_id), criterion_of(records))
    try:
        config = read_json_object(saved / CONFIG_FILE)
    except UnreadableError:  # a custom trainer may write none
        config = {}
    pattern = config.get("rank_pattern")
    of_modules = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    ranks = [answer.rank, *(rank for rank in of_modules if isinstance(rank, int))]
    return HandedOver(
        **answer.model_dump(include={*HandedOver.model_fields}),
        min_module_rank=min(ranks),
        max_module_rank=max(ranks),
        reference_adapter=f"trials/{answer.reference_id}",
        test_difference=test and test[0],
        test_difference_high=test and test[1],
    )


def rescore(run: Run) -> None:
    """Score every trial again that was scored on fewer examples, and journal it as the trial's outcome.

    Training that stopped early keeps its score: it has no adapter, and is compared with others of its stage alone.
    """
    records, folder = run.records, run.folder
    count = len(records.started.evaluation_items)
    stale = [trial for trial in records.finished() if trial.item_losses and len(trial.item_losses) < count]
    stale = [trial for trial in stale if trial.rank == 0 or folder.trial_adapter(trial.trial_id).is_dir()]
    if not stale:
        return
    before = len(stale[0].item_losses)
    run.notice(f"scoring {len(stale)} adapters on {count:,} validation examples, in place of {before:,}")
    records.adapters.clear()  # the first question is answered again, on all examples
    for trial in stale:
        run.record(run.plan.scored(trial, folder.adapter_of(trial)))
