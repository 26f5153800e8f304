"""The two answers of a run side by side: the adapter that is handed over, and the rank to train at.

`document` is what `decision.json` and `select --json` hold. The keys of the second question are null where it was not asked.
"""

from __future__ import annotations

from typing import Any

from rightrank.decision.adapter import making_of
from rightrank.decision.adapter_files import Question
from rightrank.decision.run import Records, is_token_loss
from rightrank.records import Decision, TrainingRankEstimate, TrialFinished

SECOND_QUESTION = ("rank", "verdict", "confidence", "sentence")


def question_of(records: Records) -> Question:
    """The metric and the margin of the run."""
    started = records.started
    margin = started.settings.get("margin")
    return Question(
        started.metric,
        started.higher_is_better,
        float(margin) if isinstance(margin, int | float) else None,
        is_token_loss(records),
    )


def trainings(records: Records) -> float:
    """Optimizer steps of all outcomes over those of a whole training; an arm that resumes pays for the rest."""
    finished = [one for one in records.outcomes if isinstance(one, TrialFinished) and one.rank > 0]
    stops = {one.trial_id: one.stop_at or 0 for one in finished}
    whole = max((one.steps for one in finished if one.truncate_from is None), default=0)
    steps = sum((one.stop_at or one.steps) - stops.get(one.continue_from or "", 0) for one in finished)
    return round(steps / whole, 3) if whole else float(len(finished))


def preference_sentence(trial: TrialFinished) -> str | None:
    """How often an adapter prefers the chosen answer, and how far it moved from the base; None without pairs."""
    found = trial.metrics
    if "chosen_log_ratio" not in found:
        return None
    return (
        f"On the validation pairs it prefers the chosen answer in {found['reward_accuracy']:.1%}, by a reward margin of "
        f"{found['reward_margin']:.3g}; the log-probability of chosen answers changed by {found['chosen_log_ratio']:+.3g} nats "
        "an answer from the base."
    )


def document(
    records: Records, decision: Decision | None, goal: str, estimate: TrainingRankEstimate | None = None
) -> dict[str, Any]:
    """Both answers as one JSON object. `estimate` is of the second question, where it was not asked."""
    found: dict[str, Any] = dict.fromkeys(SECOND_QUESTION)
    if decision is not None:
        found |= decision.model_dump(mode="json")
    adapter = records.adapters[-1] if records.adapters else None
    finished = records.finished()
    chosen = next((one for one in finished if adapter is not None and one.trial_id == adapter.answer.trial_id), None)
    return {
        "metric": records.started.metric,
        "higher_is_better": records.started.higher_is_better,
        "goal": goal,
        **found,
        "adapter_sentence": adapter and adapter.answer.sentence,
        "cost": {"trainings": trainings(records), "trainings_to_adapter": adapter and adapter.trainings},
        "adapter_making": chosen and making_of(chosen, finished).sentence(),
        "adapter_preference": chosen and preference_sentence(chosen),
        "handed_over": adapter and adapter.handed_over.model_dump(mode="json"),
        "guard": adapter and adapter.guard and adapter.guard.model_dump(mode="json"),
        "adapter_answer": adapter and adapter.answer.model_dump(mode="json"),
        "training_rank_estimate": estimate and estimate.model_dump(mode="json"),
    }
