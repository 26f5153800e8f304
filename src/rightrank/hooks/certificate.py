"""The certificate of a selection: one arm trained again, alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from rightrank.runs.hook import Hook, Run
from rightrank.runs.returns import Selected
from rightrank.schema.events import Event, Listener, StepDone
from rightrank.schema.trials import TrialFinished
from rightrank.train.certify import certify


class Certificate(Hook):
    """Trains one arm again, alone, and journals how far it is from its trial. A run that has a certificate keeps it.

    The arm is the one handed over. If that one was truncated from another adapter, it is the arm that shared its
    passes with the most others.
    """

    def on_end(self, run: Run, _selected: Selected) -> None:
        records, prepared = run.records, run.prepared
        assert prepared is not None
        if not records.certificates:
            handed_over = records.adapters[-1].answer.trial_id
            whole = [trial for trial in records.finished() if trial.rank > 0 and trial.stop_at is None]
            trained = [trial for trial in whole if trial.truncate_from is None]
            fullest = max(trained, key=lambda one: (one.adapters_per_pass, one.steps))
            trial = next((one for one in trained if one.trial_id == handed_over), fullest)
            adapter, scratch = run.folder.finished_adapter(trial.trial_id), run.folder.cache / "certify"
            run.on_event(certify(prepared.runtime, trial, adapter, scratch, _StepsOnly(run), _seed_difference(trained)))
        run.notice(records.certificates[-1].sentence())


class _StepsOnly(Listener):
    """Passes on the steps of the certificate's training, which is no trial of the run."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._run.on_event(event)

    def should_stop(self) -> bool:
        return self._run.should_stop()


def _seed_difference(trials: Sequence[TrialFinished]) -> float | None:
    """The mean absolute difference of the held-out value between two seeds of one rank and learning rate.

    None if no cell has two seeds.
    """
    cells: dict[tuple[int, float, int], list[float]] = {}
    for trial in trials:
        cells.setdefault((trial.rank, trial.learning_rate, trial.steps), []).append(trial.value)
    pairs = [abs(a - b) for values in cells.values() for a, b in combinations(values, 2)]
    return sum(pairs) / len(pairs) if pairs else None
