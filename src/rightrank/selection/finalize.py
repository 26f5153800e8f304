"""The end of a selection: what follows once the rank is decided."""

from __future__ import annotations

from dataclasses import replace

from rightrank.records import Decision, RunEvent, StepDone
from rightrank.records.observer import Observer
from rightrank.returns import Selected
from rightrank.selection.handover import certify_selection, hand_over_trained
from rightrank.selection.start import PreparedSelection
from rightrank.strategies.sweep import sweep_rows


def finish(prepared: PreparedSelection, decision: Decision) -> Selected:
    """Hand over the decided rank's adapter, and certify it where the settings request that."""
    selection, bench, observer = prepared.selection, prepared.prepared.bench, prepared.observer
    if prepared.estimate is not None:
        observer.notice(selection.beside_estimate(prepared.estimate))
    hand_over_trained(selection, bench, decision)
    prepared.trackers.decided(decision)
    if prepared.request.settings.certify:
        certificate = certify_selection(selection, bench, decision, _steps_alone(observer))
        observer.notice(certificate.sentence())
    records, folder = selection.records, selection.folder
    return Selected(
        decision,
        folder.path,
        folder.adapter,
        folder.report,
        records.samples,
        sweep_rows(records.started, records.outcomes),
        sum(outcome.rank > 0 for outcome in records.outcomes),
    )


def _steps_alone(observer: Observer) -> Observer:
    """The certificate's training is no trial of the run: its steps are shown, its start is not."""

    def on_event(event: RunEvent) -> None:
        if isinstance(event, StepDone):
            observer.on_event(event)

    return replace(observer, on_event=on_event)
