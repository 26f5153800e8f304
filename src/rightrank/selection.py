"""The loop: a strategy asks, an executor runs, the journal keeps, `decide` judges.

Everything that the loop knows it reads from the journal, so a run that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from rightrank.decision.run import Records, best_trial, decide_run, decision_so_far
from rightrank.engine.bench import Bench
from rightrank.engine.certify import certify
from rightrank.engine.sample import promptable_items, write_completion
from rightrank.engine.train import Watcher
from rightrank.errors import AllTrialsFailedError, DeviceMemoryError, InputError, ResultsError, RunFolderError
from rightrank.executors import Executor
from rightrank.exports.adapter_folder import hand_over
from rightrank.io.adapters import restore_adapter
from rightrank.io.files import write_text
from rightrank.io.run_folder import RunFolder
from rightrank.probe.adapter_spectra import inspect_adapter
from rightrank.records import (
    Arm,
    Certified,
    Decided,
    Decision,
    JournalRecord,
    RunEvent,
    RunStarted,
    Sample,
    TestEvaluated,
    Trial,
    TrialFailed,
    TrialFinished,
    TrialOutcome,
    TrialStarted,
    trial_id,
)
from rightrank.report.figure import AnyFigure, Figure
from rightrank.report.figures import figures_of
from rightrank.report.files import write_figures
from rightrank.report.html import render_report
from rightrank.report.spectra import spectrum_figure
from rightrank.report.sweep_table import sweep_map
from rightrank.report.wording import size
from rightrank.settings import settings_difference
from rightrank.strategies import History, Strategy
from rightrank.strategies.sweep import sweep_rows


def adapter_figures(adapter: Path) -> list[Figure]:
    """The spectrum of the adapter that was handed over; nothing before there is one, or where it is no PEFT adapter."""
    if not (adapter / "adapter_config.json").exists():
        return []
    try:
        figure = spectrum_figure(inspect_adapter(adapter))
    except InputError:
        return []
    return [] if figure is None else [figure]


def further_figures(records: Records, adapter: Path) -> list[AnyFigure]:
    """What a run shows beside the figures of its decision: the sweep, and the adapter that was handed over."""
    started = records.started
    sweep = sweep_map(sweep_rows(started, records.outcomes), started.metric, started.higher_is_better)
    return [*([] if sweep is None else [sweep]), *adapter_figures(adapter)]


Listener = Callable[[RunEvent], None]


class Selection:
    """One run folder, one strategy, one executor."""

    def __init__(
        self,
        folder: RunFolder,
        started: RunStarted,
        strategy: Strategy,
        executor: Executor,
        listener: Listener,
        predicted_peaks: Mapping[int, int] | None = None,
    ) -> None:
        """`predicted_peaks`: bytes by rank, as planned."""
        self._folder = folder
        self._strategy = strategy
        self._executor = executor
        self._listener = listener
        self._predicted_peaks = predicted_peaks or {}
        existing = folder.journal.read()
        if existing:
            require_same_run(folder, existing[0], started)
        else:
            folder.journal.append(started)
        self.records = Records.of(started, existing)

    def run(self) -> Decision:
        """Run every arm that the strategy asks for, then decide.

        Raises:
            AllTrialsFailedError: no two ranks ended with a result.
            InterruptedRun: asked to stop; what was finished is in the journal.
        """
        while arms := self._strategy.ask(History.of(self.records.outcomes)):
            for outcome in self._executor.run(self._trials(arms), self._base_loss()):
                self._keep(outcome)
                if outcome.rank == 0:
                    break  # what the others are judged against is known now: ask anew
        return self._decide()

    def hand_over(self, bench: Bench, decision: Decision) -> TrialFinished:
        """Measure the chosen and the reference trial on the test split, write samples, adapter and report."""
        chosen = best_trial(self.records, decision, decision.fallback_rank)
        reference = best_trial(self.records, decision, decision.reference_rank)
        base = next(trial for trial in self._finished() if trial.rank == 0)
        for trial in {trial.trial_id: trial for trial in (base, chosen, reference)}.values():
            self._test(bench, trial)
        if not self.records.samples:
            self._write_samples(bench, chosen)
        write_figures(self._folder.figures, figures_of(self.records, decision))
        hand_over(
            self._folder.trial_adapter(chosen.trial_id),
            self._folder.adapter,
            self.records.started,
            chosen,
            decision,
            self.records.tests,
            self._folder.figures,
        )
        self._folder.journal.append(Decided(decision=decision, adapter_trial_id=chosen.trial_id))
        self.write_views(decision)
        write_figures(self._folder.figures, further_figures(self.records, self._folder.adapter))
        self._folder.drop_working_files()
        return chosen

    def certify(self, bench: Bench, decision: Decision, watcher: Watcher) -> Certified:
        """Train one arm again alone: the one handed over, or where that was cut from another, the most packed one."""
        if self.records.certificates:
            return self.records.certificates[-1]
        chosen = best_trial(self.records, decision, decision.fallback_rank)
        whole = [trial for trial in self._finished() if trial.rank > 0 and trial.stop_at is None]
        candidates = [trial for trial in whole if trial.truncate_from is None]
        trial = chosen if chosen in candidates else max(candidates, key=lambda trial: (trial.pack_size, trial.steps))
        scratch = self._folder.cache / "certify"
        certificate = certify(
            bench, trial, self._folder.trial_adapter(trial.trial_id), scratch, watcher, seed_difference(candidates)
        )
        self._folder.journal.append(certificate)
        self.records.certificates.append(certificate)
        self.write_views(decision)
        self._folder.drop_working_files()
        return certificate

    def write_views(self, decision: Decision | None) -> None:
        """decision.json and report, each replaced whole."""
        if decision is not None:
            self._folder.write_decision(decision)
        page = render_report(
            self.records, decision, further_figures=further_figures(self.records, self._folder.adapter)
        )
        write_text(self._folder.report, page)

    def _trials(self, arms: Sequence[Arm]) -> list[Trial]:
        fingerprint = self.records.started.fingerprint
        return [Trial(trial_id=trial_id(fingerprint, arm), arm=arm) for arm in arms]

    def _keep(self, outcome: TrialOutcome) -> None:
        outcome = self._beside_plan(outcome)
        self._folder.journal.append(outcome)
        self.records.outcomes.append(outcome)
        self.write_views(decision_so_far(self.records, self._evidence()))
        self._listener(outcome)

    def _beside_plan(self, outcome: TrialOutcome) -> TrialOutcome:
        """The outcome with what the plan said of its rank, where it said anything."""
        predicted = self._predicted_peaks.get(outcome.rank)
        if predicted is None:
            return outcome
        if isinstance(outcome, TrialFailed) and outcome.error == "out_of_memory":
            reason = f"{outcome.reason}; the plan said {size(predicted)}"
            return outcome.model_copy(update={"reason": reason})
        if isinstance(outcome, TrialFinished) and outcome.pack_size == 1:  # the prediction is of one arm
            return outcome.model_copy(update={"predicted_peak_bytes": predicted})
        return outcome

    def _decide(self) -> Decision:
        finished = [trial for trial in self._finished() if trial.rank > 0]
        if not finished:
            reasons = [outcome.reason for outcome in self.records.outcomes if not isinstance(outcome, TrialFinished)]
            kinds = {outcome.type for outcome in self.records.outcomes if outcome.rank > 0}
            error = DeviceMemoryError if kinds == {"trial_failed"} else AllTrialsFailedError
            raise error(
                f"none of {len(reasons)} trials ended with a result (the first: {reasons[0]}); "
                "give lower learning rates, a smaller batch_size or seq_len, and a new --out"
            )
        try:
            return self._judge()
        except ResultsError:
            raise AllTrialsFailedError(
                "fewer than two ranks have a whole training: there is nothing to compare; "
                "give a larger budget or lower learning rates, and a new --out"
            ) from None

    def _judge(self) -> Decision:
        return decide_run(self.records, self._evidence())

    def _evidence(self) -> list[TrialOutcome]:
        """What the strategy says is comparable."""
        return self._strategy.evidence(History.of(self.records.outcomes))

    def _finished(self) -> list[TrialFinished]:
        return [outcome for outcome in self.records.outcomes if isinstance(outcome, TrialFinished)]

    def _base_loss(self) -> float | None:
        return next((trial.metrics["loss"] for trial in self._finished() if trial.rank == 0), None)

    def _test(self, bench: Bench, trial: TrialFinished) -> None:
        if any(test.trial_id == trial.trial_id for test in self.records.tests):
            return
        with bench.arm(trial.arm) as model:
            if trial.rank > 0:
                restore_adapter(model, self._folder.trial_adapter(trial.trial_id))
            scores = bench.evaluate("test")
        record = TestEvaluated(
            trial_id=trial.trial_id,
            rank=trial.rank,
            value=scores.metrics[self.records.started.metric],
            item_losses=scores.losses,
            item_tokens=scores.tokens,
            item_correct=scores.correct,
        )
        self._folder.journal.append(record)
        self.records.tests.append(record)

    def _write_samples(self, bench: Bench, chosen: TrialFinished) -> None:
        items = promptable_items(bench, bench.settings.samples)
        before = [write_completion(bench, item) for item in items]
        with bench.arm(chosen.arm) as model:
            restore_adapter(model, self._folder.trial_adapter(chosen.trial_id))
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
            self._folder.journal.append(sample)
            self.records.samples.append(sample)

    def note_start(self, started: TrialStarted) -> None:
        """Journal that a trial began."""
        self._folder.journal.append(started)
        self._listener(started)


def seed_difference(trials: Sequence[TrialFinished]) -> float | None:
    """The mean difference of the held-out value between two seeds of one rank and rate; None where there was one."""
    cells: dict[tuple[int, float, int], list[float]] = {}
    for trial in trials:
        cells.setdefault((trial.rank, trial.learning_rate, trial.steps), []).append(trial.value)
    pairs = [abs(a - b) for values in cells.values() for a, b in combinations(values, 2)]
    return sum(pairs) / len(pairs) if pairs else None


def require_same_run(folder: RunFolder, first: JournalRecord, started: RunStarted) -> None:
    """Refuse a folder that was made with another model, other data or other settings, and say which."""
    if not isinstance(first, RunStarted):
        raise RunFolderError(f"{folder.journal.path}: the first line is not a run's start; give another --out")
    if first.fingerprint == started.fingerprint:
        return
    changed = settings_difference(first.settings, started.settings)
    if not changed:
        changed = ["the data or the model's files have changed since"]
    raise RunFolderError(
        f"{folder.path}: made with other settings ({'; '.join(changed)}); give the same settings to resume, or another --out"
    )
