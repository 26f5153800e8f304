"""The end of a selection: test split, samples, hand-over and certificate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rightrank.decision.answers import trainings
from rightrank.decision.run import best_trial
from rightrank.engine.generation import expected_of, promptable_examples, write_completion
from rightrank.engine.runtime import Runtime
from rightrank.engine.scoring import measure
from rightrank.records import AdapterAnswer, Decision, RunEvent, Sample, StepDone, TestEvaluated, TrialFinished
from rightrank.records.observer import Observer
from rightrank.report.adapter_view import compared
from rightrank.report.next_command import next_commands
from rightrank.returns import Selected
from rightrank.selection.certificate import certify_selection
from rightrank.selection.guard import apply_guards
from rightrank.selection.handover import final_answer, hand_over_answer, hand_over_at_end
from rightrank.selection.loop import Selection
from rightrank.selection.rescoring import adapter_of
from rightrank.selection.start import PreparedSelection
from rightrank.settings import Goal
from rightrank.strategies.sweep import sweep_rows
from rightrank.views import answers


def finalize_adapter(prepared: PreparedSelection, answer: AdapterAnswer, *, reads_test_split: bool) -> None:
    """Hand over the answer to the first question while the second is still open: adapter, decision.json, report, one line."""
    selection = prepared.selection
    guard = None
    if reads_test_split:
        answer, guard = apply_guards(selection, prepared.prepared.runtime, prepared.guards, answer)
        _read_test_split(prepared, [answer.trial_id, answer.reference_id])
    hand_over_answer(selection, answer, guard=guard)
    selection.write_views(None)
    prepared.observer.notice(f"adapter: {answer.sentence} It is in {selection.folder.adapter}.")
    for note in answer.notes:
        prepared.observer.notice(note)


def finalize(prepared: PreparedSelection, decision: Decision | None) -> Selected:
    """Evaluate on the test split, write samples, and hand over the adapter. `decision` is None where only the adapter was asked for.

    What an interrupted run has done of this already is not done again.

    Raises:
        RunError: a view has a fault; adapter and journal are complete.
    """
    selection, runtime, observer = prepared.selection, prepared.prepared.runtime, prepared.observer
    if prepared.estimate is not None:
        line = ""
        with selection.faults.kept("the comparison with the estimate"):
            line = selection.compared_with(prepared.estimate)
        observer.notice(line)
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
        observer.notice(certify_selection(selection, runtime, decision, _steps_only(observer)).sentence())
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


def _steps_only(observer: Observer) -> Observer:
    """The observer of the certificate's training, which is no trial of the run: it receives the steps alone."""

    def on_event(event: RunEvent) -> None:
        if isinstance(event, StepDone):
            observer.on_event(event)

    return replace(observer, on_event=on_event)


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
