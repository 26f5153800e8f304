"""Judgements that decide in place of the metric, at the end of a selection with a custom trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from rightrank.decision.run import best_trial
from rightrank.plugins.judge.judgements import are_judgements, judgements_of, rows_of
from rightrank.plugins.judge.win_rate import decide_judged
from rightrank.runs.hook import Hook, Run
from rightrank.schema.decision import Decision
from rightrank.schema.errors import ResultsError, SettingsError

JudgementRows: TypeAlias = Iterable[Mapping[str, object]]
Judgements: TypeAlias = JudgementRows | str | Path | Callable[[Mapping[int, Path]], JudgementRows]


class JudgedBy(Hook):
    """Decides on the training rank by judgements.

    Args:
        judgements: rows `prompt, rank_a, rank_b, outcome[, judge]`: mappings, a file, or a function that is called once all
            trainings have ended, with the folder of each rank's best adapter, and returns the mappings.
        margin: how far below 1/2 a win rate may be; None for .05.
    """

    def __init__(self, judgements: Judgements, margin: float | None = None) -> None:
        self._judgements, self._margin = judgements, margin

    def on_prepared(self, run: Run) -> None:
        if run.settings.goal == "adapter":
            raise SettingsError("judgements decide on the rank to train at: give goal 'training-rank'")

    def on_decision(self, decision: Decision, run: Run) -> Decision:
        """The decision on judgements, with the trials of each rank's best learning rate as in the metric's decision.

        Raises:
            ResultsError: rows that can't be used, or that name a rank that was not trained.
        """
        own = {one.rank: one for one in decision.ranks}
        ranks, judgements = [rank for rank in own if rank > 0], self._judgements
        if callable(judgements):
            best = {rank: best_trial(run.records, decision, rank).trial_id for rank in ranks}
            judgements = list(judgements({rank: run.folder.trial_adapter(trial) for rank, trial in best.items()}))
        rows = rows_of(judgements)
        if not are_judgements(rows):
            raise ResultsError("judgements: no row has rank_a and rank_b; give prompt, rank_a, rank_b and outcome")
        judged = decide_judged(judgements_of(rows, ranks)[0], self._margin)
        kept = [
            one.model_copy(update={"trial_ids": own[one.rank].trial_ids, "learning_rate": own[one.rank].learning_rate})
            for one in judged.ranks
        ]
        return judged.model_copy(update={"ranks": kept, "learning_rate": own[judged.rank_at_hand].learning_rate})
