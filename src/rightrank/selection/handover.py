"""What follows the decision: the chosen trial measured on the test split, samples, the adapter with its card, the report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from rightrank.decision.run import best_trial
from rightrank.engine.certify import certify
from rightrank.engine.generation import promptable_examples, write_completion
from rightrank.engine.runtime import Runtime
from rightrank.engine.scoring import measure
from rightrank.exports.adapter_folder import hand_over
from rightrank.io.adapters import restore_adapter
from rightrank.records import Certified, Decision, DecisionRecorded, Sample, TestEvaluated, TrialFinished
from rightrank.records.observer import Observer
from rightrank.report.figures import figures_of
from rightrank.report.files import write_figures
from rightrank.selection.loop import Selection
from rightrank.views import further_figures


def hand_over_trained(selection: Selection, bench: Runtime, decision: Decision) -> TrialFinished:
    """Measure the chosen and the reference trial on the test split, write samples, adapter and report."""
    records, folder = selection.records, selection.folder
    chosen = best_trial(records, decision, decision.fallback_rank)
    reference = best_trial(records, decision, decision.reference_rank)
    base = next(trial for trial in records.finished() if trial.rank == 0)
    for trial in {trial.trial_id: trial for trial in (base, chosen, reference)}.values():
        _test(selection, bench, trial)
    if not records.samples:
        _write_samples(selection, bench, chosen)
    write_figures(folder.figures, figures_of(records, decision))
    hand_over(
        folder.finished_adapter(chosen.trial_id),
        folder.adapter,
        records.started,
        chosen,
        decision,
        records.tests,
        folder.figures,
    )
    folder.journal.append(DecisionRecorded(decision=decision, adapter_trial_id=chosen.trial_id))
    selection.write_views(decision)
    write_figures(folder.figures, further_figures(records, folder.adapter))
    folder.drop_working_files()
    return chosen


def hand_over_saved(selection: Selection, decision: Decision) -> Path | None:
    """Hand over what the chosen trial's own trainer saved, if anything, and write the views."""
    records, folder = selection.records, selection.folder
    chosen = best_trial(records, decision, decision.fallback_rank)
    saved = folder.trial_adapter(chosen.trial_id)
    adapter = folder.adapter if any(path.is_file() for path in saved.iterdir()) else None
    write_figures(folder.figures, figures_of(records, decision))
    if adapter is not None:
        hand_over(saved, adapter, records.started, chosen, decision, [], folder.figures)
    folder.journal.append(DecisionRecorded(decision=decision, adapter_trial_id=chosen.trial_id))
    selection.write_views(decision)
    return adapter


def certify_selection(selection: Selection, bench: Runtime, decision: Decision, observer: Observer) -> Certified:
    """Train one arm again alone: the one handed over, or where that was cut from another, the most packed one."""
    records, folder = selection.records, selection.folder
    if records.certificates:
        return records.certificates[-1]
    chosen = best_trial(records, decision, decision.fallback_rank)
    whole = [trial for trial in records.finished() if trial.rank > 0 and trial.stop_at is None]
    candidates = [trial for trial in whole if trial.truncate_from is None]
    trial = (
        chosen if chosen in candidates else max(candidates, key=lambda trial: (trial.adapters_per_pass, trial.steps))
    )
    scratch = folder.cache / "certify"
    adapter = folder.finished_adapter(trial.trial_id)
    certificate = certify(bench, trial, adapter, scratch, observer, seed_difference(candidates))
    folder.journal.append(certificate)
    records.certificates.append(certificate)
    selection.write_views(decision)
    folder.drop_working_files()
    return certificate


def seed_difference(trials: Sequence[TrialFinished]) -> float | None:
    """The mean difference of the held-out value between two seeds of one rank and rate; None where there was one."""
    cells: dict[tuple[int, float, int], list[float]] = {}
    for trial in trials:
        cells.setdefault((trial.rank, trial.learning_rate, trial.steps), []).append(trial.value)
    pairs = [abs(a - b) for values in cells.values() for a, b in combinations(values, 2)]
    return sum(pairs) / len(pairs) if pairs else None


def _test(selection: Selection, bench: Runtime, trial: TrialFinished) -> None:
    records, folder = selection.records, selection.folder
    if any(test.trial_id == trial.trial_id for test in records.tests):
        return
    with bench.arm(trial.arm) as model:
        if trial.rank > 0:
            restore_adapter(model, folder.finished_adapter(trial.trial_id))
        scores = bench.evaluate("test")
        measured = measure(bench, "test")
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


def _write_samples(selection: Selection, bench: Runtime, chosen: TrialFinished) -> None:
    items = promptable_examples(bench, bench.settings.samples)
    before = [write_completion(bench, item) for item in items]
    with bench.arm(chosen.arm) as model:
        restore_adapter(model, selection.folder.finished_adapter(chosen.trial_id))
        after = [write_completion(bench, item) for item in items]
    for item, first, then in zip(items, before, after, strict=True):
        sample = Sample(
            trial_id=chosen.trial_id,
            item_id=item.item_id,
            prompt=item.content["prompt"],
            expected=item.content["completion"],
            before=first,
            after=then,
        )
        selection.folder.journal.append(sample)
        selection.records.samples.append(sample)
