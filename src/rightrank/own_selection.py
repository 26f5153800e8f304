"""A selection with a trainer of one's own: the strategy asks, the trainer answers, the journal keeps, `decide` judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rightrank.decision.run import Records, best_trial, decide_run, decision_so_far
from rightrank.errors import AllTrialsFailedError, InterruptedRun, ResultsError, RunFolderError
from rightrank.executors import Executor
from rightrank.exports.adapter_folder import hand_over
from rightrank.io.files import write_text
from rightrank.io.run_folder import RunFolder
from rightrank.records import (
    Arm,
    Decided,
    Decision,
    RunEvent,
    RunStarted,
    Trial,
    TrialFailed,
    TrialFinished,
    TrialOutcome,
    TrialStarted,
    trial_id,
)
from rightrank.report.figures import figures_of
from rightrank.report.files import write_figures
from rightrank.report.html import render_report
from rightrank.settings import settings_difference
from rightrank.strategies import History, Strategy

GIVE_UP_AFTER = 3  # trials that failed with none that ended well: the function is wrong, not the arm


class OwnSelection:
    """One run folder, one strategy, one trainer."""

    def __init__(
        self,
        folder: RunFolder,
        started: RunStarted,
        strategy: Strategy,
        with_base: bool,
        listener: Callable[[RunEvent], None],
    ) -> None:
        self._folder = folder
        self._strategy = strategy
        self._with_base = with_base
        self._listener = listener
        journal = folder.journal.read()
        if not journal:
            folder.journal.append(started)
        elif not isinstance(journal[0], RunStarted) or journal[0].fingerprint != started.fingerprint:
            raise _other_run(folder.path, journal[0], started)
        self.records = Records.of(started, journal)
        # A trial that failed is asked for again: the function may have been mended since.
        self.records.outcomes = [o for o in self.records.outcomes if not isinstance(o, TrialFailed)]

    def items(self) -> int | None:
        """How many held-out items the trials so far have scored."""
        return next((len(trial.item_scores) for trial in self.records.finished() if trial.item_scores), None)

    def run(self, executor: Executor, should_stop: Callable[[], bool]) -> Decision:
        """Every arm that the strategy asks for, then the decision.

        Raises:
            AllTrialsFailedError: the first trials all failed, or no two ranks ended with a result.
            InterruptedRun: asked to stop; what was finished is in the journal.
        """
        while arms := self._strategy.ask(History.of(self._seen())):
            for outcome in executor.run(self._trials(arms), None):
                self._keep(outcome)
                if should_stop():
                    raise InterruptedRun(f"stopped after {len(self.records.outcomes)} trials")
        try:
            return decide_run(self.records)
        except ResultsError as error:
            raise AllTrialsFailedError(f"{error}{self._first_reason()}") from None

    def finish(self, decision: Decision) -> Path | None:
        """Hand over what the chosen trial saved, if anything, and write the views."""
        chosen = best_trial(self.records, decision, decision.fallback_rank)
        saved = self._folder.trial_adapter(chosen.trial_id)
        write_figures(self._folder.figures, figures_of(self.records, decision))
        adapter = self._folder.adapter if any(path.is_file() for path in saved.iterdir()) else None
        if adapter is not None:
            hand_over(saved, adapter, self.records.started, chosen, decision, [], self._folder.figures)
        self._folder.journal.append(Decided(decision=decision, adapter_trial_id=chosen.trial_id))
        self._write_views(decision)
        return adapter

    def note_start(self, started: TrialStarted) -> None:
        """Journal that a trial began."""
        self._folder.journal.append(started)
        self._listener(started)

    def _seen(self) -> list[TrialOutcome]:
        """What the strategy is shown. A base that nobody evaluates is shown as one that gave no result."""
        outcomes = list(self.records.outcomes)
        if not self._with_base:
            base = next(iter(self._strategy.ask(History.of([]))))
            assert base.rank == 0, "a strategy asks for the base first"
            outcomes.append(TrialFailed(trial_id="", **base.model_dump(), error="error", reason="not evaluated"))
        return outcomes

    def _trials(self, arms: Sequence[Arm]) -> list[Trial]:
        fingerprint = self.records.started.fingerprint
        return [Trial(trial_id=trial_id(fingerprint, arm), arm=arm) for arm in arms]

    def _keep(self, outcome: TrialOutcome) -> None:
        self._folder.journal.append(outcome)
        self.records.outcomes.append(outcome)
        self._write_views(decision_so_far(self.records))
        self._listener(outcome)
        failed = [o for o in self.records.outcomes if isinstance(o, TrialFailed)]
        if len(failed) >= GIVE_UP_AFTER and not self.records.finished():
            raise AllTrialsFailedError(f"the first {len(failed)} trials failed{self._first_reason()}")

    def _first_reason(self) -> str:
        reasons = [outcome.reason for outcome in self.records.outcomes if not isinstance(outcome, TrialFinished)]
        return f" (the first: {reasons[0]})" if reasons else ""

    def _write_views(self, decision: Decision | None) -> None:
        if decision is not None:
            self._folder.write_decision(decision)
        write_text(self._folder.report, render_report(self.records, decision))


def _other_run(path: Path, first: object, started: RunStarted) -> RunFolderError:
    if not isinstance(first, RunStarted):
        return RunFolderError(f"{path}: the journal's first line is not a run's start; give another out")
    changed = "; ".join(settings_difference(first.settings, started.settings)) or "the trainer's version"
    return RunFolderError(f"{path}: made with other settings ({changed}); give the same to resume, or another out")
