"""The guard in the answer: an adapter that is enough on the task and no worse than the base on the guard's data.

The joint claim "enough and not worse" fails where either part fails, so each part is tested at the whole level (an
intersection-union test: Berger 1982, Technometrics 24), and so is each of several guard files. Only the choice among several
adapters needs a correction: with k adapters that are enough on the task, each guard bound has the level 1 - 0.05/k.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rightrank.decision.adapter import AdapterFile, Against, Criterion, against_reference, claim, files_of, with_adapter
from rightrank.decision.comparison import CONFIDENCE, Estimate, bounds_of, estimate, examples_needed, is_within
from rightrank.decision.table import groups_of
from rightrank.schema.decision import AdapterAnswer, AdapterCandidate
from rightrank.schema.events import GuardAnswer, GuardEvaluated, GuardFile
from rightrank.schema.trials import TrialOutcome

GUARD_MARGIN = 0.02
"""Nats per token: 2% of a perplexity. People accept more from loading the base in 4 bits, which costs about 0.03 to 0.05."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """An adapter on every guard file."""

    file: AdapterFile
    task: AdapterCandidate
    guards: Mapping[str, Estimate]
    against: Against

    def high(self, confidence: float) -> float:
        return self.worst(confidence).bound(confidence)

    def worst(self, confidence: float) -> Estimate:
        """The difference with the highest upper bound of any file."""
        return max(self.guards.values(), key=lambda estimated: estimated.bound(confidence))


def guarded(
    answer: AdapterAnswer,
    outcomes: Sequence[TrialOutcome],
    criterion: Criterion,
    evaluated: Iterable[GuardEvaluated],
    margin: float,
    before: GuardAnswer | None = None,
) -> tuple[AdapterAnswer, GuardAnswer]:
    """The answer among the adapters that keep the guard, and how the handed-over adapter does on it.

    Args:
        evaluated: of the base and of every adapter that was measured on all guard files.
        margin: how much worse than the base is still allowed, nats.
        before: the guard of an earlier answer of the same run, which `answer` may already keep.
    """
    measured = _measured(answer, outcomes, criterion, evaluated)
    task_rank, task_id = answer.rank, answer.trial_id
    if before is not None and before.task_rank <= answer.rank:
        task_rank, task_id = before.task_rank, before.task_trial_id
    enough = [adapter for adapter in measured if adapter.task.holds and adapter.task.rank >= task_rank]
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(enough))
    both = [adapter for adapter in enough if is_within(adapter.high(confidence), margin)]
    chosen_id = task_id
    if both and task_id not in {adapter.task.trial_id for adapter in both}:
        chosen_id = min(both, key=lambda kept: (kept.task.rank, kept.file.cell.loss, kept.task.trial_id)).task.trial_id
    by_id = {adapter.task.trial_id: adapter for adapter in measured}
    chosen = by_id[chosen_id]
    files = [
        GuardFile(
            file=name,
            difference=estimated.mean,
            difference_high=(high := estimated.bound(confidence)),
            holds=is_within(high, margin),
            examples=estimated.examples,
        )
        for name, estimated in chosen.guards.items()
    ]
    worst = max(files, key=lambda guard_file: guard_file.difference_high)
    guard = GuardAnswer(
        difference=worst.difference,
        difference_high=worst.difference_high,
        holds=worst.holds,
        margin=margin,
        confidence=confidence,
        files=files,
        task_rank=task_rank,
        task_trial_id=task_id,
        sentence=_sentence(chosen, worst, by_id[task_id], margin, confidence),
    )
    if chosen_id == answer.trial_id:
        return answer, guard
    task = chosen.task
    moved = with_adapter(
        answer,
        task,
        f"The smallest adapter within the margin on the task that keeps the guard has rank {task.rank} ({task.how}, learning rate "
        f"{chosen.file.trial.learning_rate:g}): {claim(task, 'the reference', chosen.against)}",
    )
    return moved, guard


def _measured(
    answer: AdapterAnswer, outcomes: Sequence[TrialOutcome], criterion: Criterion, evaluated: Iterable[GuardEvaluated]
) -> list[_Measured]:
    """Every adapter that was measured on all guard files, against the base there and the reference on the task."""
    losses = {(losses_of.trial_id, losses_of.file): losses_of for losses_of in evaluated}
    bases = {base.file: base for base in losses.values() if base.rank == 0}
    files = files_of(outcomes, criterion)
    against = against_reference(answer, files, criterion)
    return [
        _Measured(
            file,
            against.candidate(file),
            {
                name: estimate(
                    np.subtract(losses[trial_id, name].item_losses, bases[name].item_losses)[None, :],
                    np.asarray(bases[name].item_tokens, dtype=np.float64),
                    groups=groups_of(bases[name].item_groups, len(bases[name].item_tokens)),
                )
                for name in bases
            },
            against,
        )
        for trial_id, file in files.items()
        if all((trial_id, name) in losses for name in bases)
    ]


def _sentence(chosen: _Measured, worst: GuardFile, task: _Measured, margin: float, confidence: float) -> str:
    figures = (
        f"the loss on {_name(worst.file)} differs from the base's by {worst.difference:+.3g} nats (upper bound "
        f"{worst.difference_high:+.3g}), guard margin {margin:g}"
    )
    if worst.holds and chosen is task:
        return f"Guard: kept; {figures}."
    if worst.holds:
        return (
            f"Guard: kept by rank {chosen.task.rank} at learning rate {chosen.file.trial.learning_rate:g}; {figures}. By the task "
            f"alone the answer would be rank {task.task.rank} at learning rate {task.file.trial.learning_rate:g}, which is not "
            f"shown to keep it (upper bound {task.high(confidence):+.3g})."
        )
    if any(bounds_of(estimated).is_enough(margin) is False for estimated in chosen.guards.values()):
        return f"Guard: broken, and no adapter of the run is both enough on the task and within it; {figures}."
    worst_loss = chosen.worst(confidence)
    needed = examples_needed(worst_loss, margin, confidence)
    cure = "more" if needed is None else f"about {needed:,}"
    return (
        f"Guard: not shown to hold, and no adapter of the run is shown to be both; {figures}; {cure} guard examples in place of "
        f"{worst_loss.examples:,} would show whether it is worse."
    )


def _name(file: str) -> str:
    return re.split(r"[\\/]", file)[-1]
