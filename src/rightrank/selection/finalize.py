"""The end of a selection: test split, samples, hand-over and certificate."""

from __future__ import annotations

from dataclasses import replace

from rightrank.decision.run import best_trial
from rightrank.engine.generation import promptable_examples, write_completion
from rightrank.engine.runtime import Runtime
from rightrank.engine.scoring import measure
from rightrank.io.adapters import restore_adapter
from rightrank.records import Decision, RunEvent, Sample, StepDone, TestEvaluated, TrialFinished
from rightrank.records.observer import Observer
from rightrank.returns import Selected
from rightrank.selection.certificate import certify_selection
from rightrank.selection.handover import hand_over_trained
from rightrank.selection.loop import Selection
from rightrank.selection.start import PreparedSelection
from rightrank.strategies.sweep import sweep_rows


def finalize(prepared: PreparedSelection, decision: Decision) -> Selected:
    """Evaluate on the test split, write samples, and hand over the adapter of the chosen trial.

    What an interrupted run has done of this already is not done again.
    """
    selection, runtime, observer = prepared.selection, prepared.prepared.runtime, prepared.observer
    if prepared.estimate is not None:
        observer.notice(selection.compared_with(prepared.estimate))
    records, folder = selection.records, selection.folder
    chosen = best_trial(records, decision, decision.fallback_rank)
    reference = best_trial(records, decision, decision.reference_rank)
    base = next(trial for trial in records.finished() if trial.rank == 0)
    for trial in {trial.trial_id: trial for trial in (base, chosen, reference)}.values():
        _evaluate_on_test_split(selection, runtime, trial)
    if not records.samples:
        _write_samples(selection, runtime, chosen)
    hand_over_trained(selection, decision)
    prepared.trackers.decided(decision)
    if prepared.request.settings.certify:
        observer.notice(certify_selection(selection, runtime, decision, _steps_only(observer)).sentence())
    return Selected(
        decision,
        folder.path,
        folder.adapter,
        folder.report,
        records.samples,
        sweep_rows(records.started, records.outcomes),
        sum(outcome.rank > 0 for outcome in records.outcomes),
    )


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
    with runtime.arm(trial.arm) as model:
        if trial.rank > 0:
            restore_adapter(model, folder.finished_adapter(trial.trial_id))
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
        item_losses=scores.losses,
        item_tokens=scores.tokens,
        item_correct=scores.correct,
    )
    folder.journal.append(record)
    records.tests.append(record)


def _write_samples(selection: Selection, runtime: Runtime, chosen: TrialFinished) -> None:
    examples = promptable_examples(runtime, runtime.settings.samples)
    before = [write_completion(runtime, example) for example in examples]
    with runtime.arm(chosen.arm) as model:
        restore_adapter(model, selection.folder.finished_adapter(chosen.trial_id))
        after = [write_completion(runtime, example) for example in examples]
    for example, first, then in zip(examples, before, after, strict=True):
        sample = Sample(
            trial_id=chosen.trial_id,
            item_id=example.item_id,
            prompt=example.content["prompt"],
            expected=example.content["completion"],
            before=first,
            after=then,
        )
        selection.folder.journal.append(sample)
        selection.records.samples.append(sample)
