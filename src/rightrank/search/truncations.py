"""Choose the adapter among the truncations of a run's training at the top rank, by their recorded scores."""

from __future__ import annotations

from collections.abc import Sequence

from rightrank.adapters.find_smallest import find_smallest
from rightrank.decision.adapter import Criterion, ReferenceComparison, build_truncation_answer
from rightrank.decision.run import describe_checkpoint, find_base, score_trials
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.trials import TrialFinished, TrialOutcome


def choose_adapter(
    outcomes: Sequence[TrialOutcome], criterion: Criterion, top_id: str | None = None
) -> AdapterAnswer | None:
    """Choose the smallest adapter within the margin, or return None if no training has been truncated.

    Args:
        outcomes: the outcomes of a run; only finished trials count.
        top_id: the training whose truncations are the candidates; None: the best one that was truncated.
    """
    adapters = score_trials(outcomes, criterion)
    trials = {trial.trial_id: trial for trial in outcomes if isinstance(trial, TrialFinished)}
    parents = {name: trials[name].truncate_from for name in adapters}
    tops = [adapters[name] for name in adapters if name in parents.values() and top_id in (None, name)]
    if not tops:
        return None
    top = min(tops, key=lambda adapter: (-adapter.rank, adapter.cell.loss, adapter.name))
    truncations = [adapters[name] for name, parent in parents.items() if parent == top.name]
    base = find_base(outcomes, criterion, top.name)
    by_rank = {adapter.rank: adapter for adapter in [*truncations, *([base] if base else [])]}
    smallest = find_smallest(top, by_rank, by_rank.get, lambda adapter: adapter, criterion)
    comparison = ReferenceComparison(top, adapters, criterion, base)
    # A pass over the base evaluates all truncations together, so the answer also lists those below the first that fails.
    notes = describe_checkpoint(trials[top.name], criterion, comparison.margin)
    return build_truncation_answer(smallest.adapter, truncations, comparison, notes)
