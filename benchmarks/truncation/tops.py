"""The trained adapters that are truncated: trainings at the top rank in work folders of `benchmarks.selection.real_training`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rightrank.runs.folder import RunFolder
from rightrank.schema.trials import TrialFinished


@dataclass(frozen=True)
class Top:
    """A whole training and its adapter."""

    trial: TrialFinished
    adapter: Path


def whole_trainings(work: Path) -> list[TrialFinished]:
    """Trainings of every rank that ran to their end."""
    records = [record for record in RunFolder(work).journal.read() if isinstance(record, TrialFinished)]
    return [one for one in records if one.rank > 0 and one.stop_at is None and one.truncate_from is None]


def best_tops(work: Path, rank: int) -> list[Top]:
    """For each seed the training at `rank` whose learning rate has the lowest validation loss."""
    best: dict[int, TrialFinished] = {}
    for trial in whole_trainings(work):
        known = best.get(trial.seed)
        if trial.rank == rank and (known is None or trial.metrics["loss"] < known.metrics["loss"]):
            best[trial.seed] = trial
    return [Top(best[seed], RunFolder(work).trial_adapter(best[seed].trial_id)) for seed in sorted(best)]
