"""The trials that figures show: those of each rank, and the best of them."""

from __future__ import annotations

from collections.abc import Sequence

from rightrank.decision.run import Records
from rightrank.records import Decision, RankEvidence, TrialFinished


def trained(decision: Decision) -> list[RankEvidence]:
    """The ranks that were trained, ascending."""
    return sorted((evidence for evidence in decision.ranks if evidence.rank > 0), key=lambda evidence: evidence.rank)


def best_trials(records: Records, decision: Decision | None) -> dict[int, list[TrialFinished]]:
    """The trials of each rank at its best learning rate: those that the decision names, if there is one."""
    finished = records.finished()
    by_id = {trial.trial_id: trial for trial in finished}
    if decision is not None:
        named = {e.rank: [by_id[i] for i in e.trial_ids if i in by_id] for e in trained(decision)}
        return {rank: trials for rank, trials in named.items() if trials}
    groups = by_rank([trial for trial in finished if trial.rank > 0 and trial.arm.is_direct])
    return {rank: [best_of(trials, records)] for rank, trials in groups.items()}


def best_of(trials: Sequence[TrialFinished], records: Records) -> TrialFinished:
    """The trial with the best held-out value."""
    sign = -1 if records.started.higher_is_better else 1
    return min(trials, key=lambda trial: sign * trial.value)


def by_rank(trials: Sequence[TrialFinished]) -> dict[int, list[TrialFinished]]:
    """The trials of each rank, ranks ascending."""
    ranks = sorted({trial.rank for trial in trials})
    return {rank: [trial for trial in trials if trial.rank == rank] for rank in ranks}
