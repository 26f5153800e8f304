"""The certificate of a selection: one arm trained again, alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from rightrank.runs.loop import Selection
from rightrank.schema.decision import Decision
from rightrank.schema.events import Certified, Event, Listener, StepDone
from rightrank.schema.trials import TrialFinished
from rightrank.train.certify import certify
from rightrank.train.runtime import Runtime


def certify_selection(
    selection: Selection, runtime: Runtime, decision: Decision | None, listener: Listener
) -> Certified:
    """Train one arm again, alone, and journal how far it is from its trial.

    The arm is the one handed over. If that one was truncated from another adapter, it is the arm that shared its
    passes with the most others. A run that has a certificate keeps it.
    """
    records, folder = selection.records, selection.folder
    if records.certificates:
        return records.certificates[-1]
    handed_over = records.adapters[-1].answer.trial_id if records.adapters else None
    whole = [trial for trial in records.finished() if trial.rank > 0 and trial.stop_at is None]
    candidates = [trial for trial in whole if trial.truncate_from is None]
    fullest = max(candidates, key=lambda one: (one.adapters_per_pass, one.steps))
    trial = next((one for one in candidates if one.trial_id == handed_over), fullest)
    scratch = folder.cache / "certify"
    adapter = folder.finished_adapter(trial.trial_id)
    certificate = certify(runtime, trial, adapter, scratch, _StepsOnly(listener), seed_difference(candidates))
    folder.journal.append(certificate)
    records.certificates.append(certificate)
    selection.write_views(decision)
    folder.drop_working_files()
    return certificate


class _StepsOnly(Listener):
    """Passes on the steps of the certificate's training, which is no trial of the run."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._listener.on_event(event)

    def should_stop(self) -> bool:
        return self._listener.should_stop()


def seed_difference(trials: Sequence[TrialFinished]) -> float | None:
    """The mean absolute difference of the held-out value between two seeds of one rank and learning rate.

    None if no cell has two seeds.
    """
    cells: dict[tuple[int, float, int], list[float]] = {}
    for trial in trials:
        cells.setdefault((trial.rank, trial.learning_rate, trial.steps), []).append(trial.value)
    pairs = [abs(a - b) for values in cells.values() for a, b in combinations(values, 2)]
    return sum(pairs) / len(pairs) if pairs else None
