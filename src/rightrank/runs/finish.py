"""The hand-over: `adapter/` holds the answer to the first question, with its card, from the first answer on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rightrank.data.files import UnreadableError, read_json_object
from rightrank.decision.adapter import (
    adapter_answer,
    compared_adapters,
    improved_by_training,
    making_of,
    test_difference,
    trained_answer,
)
from rightrank.decision.run import Records, best_trial, question_of, trainings
from rightrank.hooks.certificate import certify_selection
from rightrank.hooks.guard import apply_guards
from rightrank.hooks.report import answers, further_figures
from rightrank.report.adapters import candidate_table, compared, figure_of
from rightrank.report.card import AdapterCardFacts, hand_over, model_card
from rightrank.report.figures import figures_of
from rightrank.report.sentences import next_commands, test_rows
from rightrank.report.svg import write_figures
from rightrank.runs.loop import Selection
from rightrank.runs.rescoring import adapter_of
from rightrank.runs.returns import Selected
from rightrank.runs.start import PreparedSelection
from rightrank.schema.decision import AdapterAnswer, Decision, HandedOver
from rightrank.schema.errors import AllTrialsFailedError
from rightrank.schema.events import DecisionRecorded, GuardAnswer, Sample, TestEvaluated
from rightrank.schema.settings import Goal
from rightrank.schema.trials import TrialFinished
from rightrank.search.sweep import sweep_rows
from rightrank.train.generation import expected_of, promptable_examples, write_completion
from rightrank.train.metrics import measure
from rightrank.train.runtime import Runtime


def finalize_adapter(prepared: PreparedSelection, answer: AdapterAnswer, *, reads_test_split: bool) -> None:
    """Hand over the answer to the first question while the second is still open: adapter, decision.json, report, one line."""
    selection = prepared.selection
    guard = None
    if reads_test_split:
        answer, guard = apply_guards(selection, prepared.prepared.runtime, prepared.guards, answer)
        _read_test_split(prepared, [answer.trial_id, answer.reference_id])
    hand_over_answer(selection, answer, guard=guard)
    selection.write_views(None)
    prepared.hooks.notice(f"adapter: {answer.sentence} It is in {selection.folder.adapter}.")
    for note in answer.notes:
        prepared.hooks.notice(note)


def finalize(prepared: PreparedSelection, decision: Decision | None) -> Selected:
    """Evaluate on the test split, write samples, and hand over the adapter. `decision` is None where only the adapter was asked for.

    What an interrupted run has done of this already is not done again.

    Raises:
        RunError: a view has a fault; adapter and journal are complete.
    """
    selection, runtime, hooks = prepared.selection, prepared.prepared.runtime, prepared.hooks
    if prepared.estimate is not None:
        line = ""
        with selection.faults.kept("the comparison with the estimate"):
            line = selection.compared_with(prepared.estimate)
        hooks.notice(line)
    records, folder = selection.records, selection.folder
    answer, guard = apply_guards(selection, runtime, prepared.guards, final_answer(selection, decision))
    read = [
        next(trial.trial_id for trial in records.finished() if trial.rank == 0),
        answer.trial_id,
        answer.reference_id,
    ]
    if decision is not None:
        ranks = (decision.fallback_rank, decision.reference_rank)
        read += [best_trial(records, decision, rank).trial_id for rank in ranks]
    _read_test_split(prepared, read)
    chosen = next(trial for trial in records.finished() if trial.trial_id == answer.trial_id)
    if not any(sample.trial_id == chosen.trial_id for sample in records.samples):
        _write_samples(selection, runtime, chosen)
    hand_over_at_end(selection, answer, decision, guard)
    if decision is not None:
        prepared.trackers.decided(decision)
    if prepared.request.settings.certify:
        hooks.notice(certify_selection(selection, runtime, decision, hooks).sentence())
    selected = None
    with selection.faults.kept("the answer"):
        selected = _selected(selection, decision, prepared.prepared.settings.goal)
    selection.faults.require_none(folder.path)
    assert selected is not None
    return selected


def _selected(selection: Selection, decision: Decision | None, goal: Goal) -> Selected:
    records, folder = selection.records, selection.folder
    return Selected(
        decision,
        folder.path,
        folder.adapter,
        folder.report,
        answers(records, decision, goal),
        records.samples,
        sweep_rows(records.started, records.outcomes),
        trainings(records),
        next_commands(records.started, decision, str(folder.path)),
        compared(records),
    )


def _read_test_split(prepared: PreparedSelection, trial_ids: Sequence[str]) -> None:
    """Evaluate trials on the test split, each once in a run; without a test split, none."""
    if not prepared.prepared.runtime.examples("test"):
        return
    trials = {trial.trial_id: trial for trial in prepared.selection.records.finished()}
    for trial_id in dict.fromkeys(trial_ids):
        _evaluate_on_test_split(prepared.selection, prepared.prepared.runtime, trials[trial_id])


def _evaluate_on_test_split(selection: Selection, runtime: Runtime, trial: TrialFinished) -> None:
    records, folder = selection.records, selection.folder
    if any(test.trial_id == trial.trial_id for test in records.tests):
        return
    with adapter_of(selection.folder, runtime, trial):
        scores = runtime.evaluate("test")
        measured = measure(runtime, "test")
    metric = records.started.metric
    measured.require([metric])
    values = scores.metrics | measured.values
    record = TestEvaluated(
        trial_id=trial.trial_id,
        rank=trial.rank,
        value=values.get(metric, scores.loss),
        metric=None if metric in values else "loss",
        metrics=values,
        **scores.fields,
    )
    folder.journal.append(record)
    records.tests.append(record)


def _write_samples(selection: Selection, runtime: Runtime, chosen: TrialFinished) -> None:
    examples = promptable_examples(runtime, runtime.settings.samples)
    before = [write_completion(runtime, example) for example in examples]
    with adapter_of(selection.folder, runtime, chosen):
        after = [write_completion(runtime, example) for example in examples]
    for example, first, then in zip(examples, before, after, strict=True):
        sample = Sample(
            trial_id=chosen.trial_id,
            item_id=example.item_id,
            prompt=example.content["prompt"],
            expected=expected_of(example),
            before=first,
            after=then,
        )
        selection.folder.journal.append(sample)
        selection.records.samples.append(sample)


CONFIG = "adapter_config.json"


def hand_over_answer(
    selection: Selection,
    answer: AdapterAnswer,
    decision: Decision | None = None,
    guard: GuardAnswer | None = None,
) -> None:
    """Make `adapter/` the answer to the first question, and record it in the journal.

    A second call with the same answer writes the card again, with what is known by then. Without a card, where that has a
    fault, the adapter is handed over all the same.
    """
    records, folder = selection.records, selection.folder
    saved = folder.finished_adapter(answer.trial_id)
    handed_over = _handed_over(records, answer, saved)
    with selection.faults.kept("the figure of the adapters"):
        started, adapters = records.started, compared_adapters(answer, records.plain(), question_of(records))
        write_figures(folder.figures, [figure_of(answer, adapters, started.metric, started.higher_is_better)])
    card = None
    with selection.faults.kept("the adapter's card"):
        card = _card(records, answer, decision, handed_over, guard)
    hand_over(saved, folder.adapter, folder.figures, card)
    last = records.adapters[-1] if records.adapters else None
    if last is None or (last.answer, last.handed_over, last.guard) != (answer, handed_over, guard):
        selection.keep_adapter(answer, handed_over, guard)


def _card(
    records: Records,
    answer: AdapterAnswer,
    decision: Decision | None,
    handed_over: HandedOver,
    guard: GuardAnswer | None,
) -> str:
    chosen = next(trial for trial in records.finished() if trial.trial_id == answer.trial_id)
    facts = AdapterCardFacts(
        sentence=answer.sentence,
        making=making_of(chosen, records.finished()),
        handed_over=handed_over,
        margin=answer.margin,
        candidates=candidate_table(answer, records.started.metric),
        guard=guard,
    )
    return model_card(records.started, chosen, decision, test_rows(records), facts)


def hand_over_at_end(
    selection: Selection, answer: AdapterAnswer, decision: Decision | None, guard: GuardAnswer | None = None
) -> None:
    """Write the adapter, its card, the report and the figures, and the decision into the journal; drop the working files."""
    records, folder = selection.records, selection.folder
    _write_figures(selection, decision)
    hand_over_answer(selection, answer, decision, guard)
    if decision is not None:
        folder.journal.append(DecisionRecorded(decision=decision, adapter_trial_id=answer.trial_id))
    selection.write_views(decision)
    with selection.faults.kept("the figures of the adapter"):
        write_figures(folder.figures, further_figures(records, folder.adapter))
    folder.drop_working_files()


def _write_figures(selection: Selection, decision: Decision | None) -> None:
    with selection.faults.kept("the figures"):
        write_figures(selection.folder.figures, figures_of(selection.records, decision))


def hand_over_saved(selection: Selection, decision: Decision | None) -> Path | None:
    """Hand over what a custom trainer saved for the chosen trial, and write the report and the figures.

    Returns:
        The adapter's folder; None if the trainer saved nothing.
    """
    folder = selection.folder
    answer = final_answer(selection, decision)
    saved = folder.trial_adapter(answer.trial_id)
    adapter = folder.adapter if any(path.is_file() for path in saved.iterdir()) else None
    _write_figures(selection, decision)
    if adapter is not None:
        hand_over_answer(selection, answer, decision)
    if decision is not None:
        folder.journal.append(DecisionRecorded(decision=decision, adapter_trial_id=answer.trial_id))
    selection.write_views(decision)
    return adapter


def final_answer(selection: Selection, decision: Decision | None) -> AdapterAnswer:
    """The answer to the first question at the end of a run.

    It is the recorded one, or one from the candidates that a budget left, or the best trained adapter. A direct training of
    the second question takes its place where it is better.

    Raises:
        AllTrialsFailedError: no training ended.
    """
    records = selection.records
    question, plain = question_of(records), records.plain()
    known = records.adapters[-1].answer if records.adapters else adapter_answer(plain, question)
    if known is not None:
        return improved_by_training(known, plain, question) or known
    if decision is not None:
        ranks = (decision.fallback_rank, decision.reference_rank)
        chosen, reference = (best_trial(records, decision, rank) for rank in ranks)
        return trained_answer(chosen, question, reference)
    direct = [trial for trial in records.finished() if trial.rank > 0 and trial.arm.is_direct]
    if not direct:
        raise AllTrialsFailedError("no training at the top rank ended: give a larger budget, or lower learning rates")
    sign = -1 if question.higher_is_better else 1
    return trained_answer(min(direct, key=lambda trial: (-trial.rank, sign * trial.value)), question)


def _handed_over(records: Records, answer: AdapterAnswer, saved: Path) -> HandedOver:
    tests = {test.trial_id: test for test in records.tests}
    test = test_difference(tests.get(answer.trial_id), tests.get(answer.reference_id), question_of(records))
    return HandedOver(
        rank=answer.rank,
        max_module_rank=_max_module_rank(saved, answer.rank),
        how=answer.how,
        trained_rank=answer.trained_rank,
        reference_adapter=f"trials/{answer.reference_id}",
        difference=answer.difference,
        difference_high=answer.difference_high,
        test_difference=test and test[0],
        test_difference_high=test and test[1],
    )


def _max_module_rank(adapter: Path, rank: int) -> int:
    """The largest rank of any module, by the adapter's configuration; `rank` where it has none."""
    try:
        config = read_json_object(adapter / CONFIG)
    except UnreadableError:
        return rank
    pattern = config.get("rank_pattern")
    ranks = [value for value in pattern.values() if isinstance(value, int)] if isinstance(pattern, dict) else []
    return max([rank, *ranks])
