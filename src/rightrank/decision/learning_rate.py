"""Describe the choice of the learning rate: how the others did at the step at which all of them were compared."""

from __future__ import annotations

from collections.abc import Sequence

from rightrank.decision.adapter import Criterion
from rightrank.decision.comparison import compute_bounds, is_within
from rightrank.decision.table import estimate_trial_difference
from rightrank.schema.decision import LearningRateAnswer, LearningRateCandidate
from rightrank.schema.metrics import compute_default_margin, infer_metric_kind
from rightrank.schema.trials import TrialFinished, TrialOutcome


def describe_learning_rate(
    trained: TrialFinished, outcomes: Sequence[TrialOutcome], criterion: Criterion
) -> LearningRateAnswer | None:
    """Compare the learning rate of a finished training with the others that were tried with its rank and seed.

    They are compared at the earliest step that at least two of them reached, by the loss if trainings stopped early.

    Returns:
        The answer; None if only one learning rate was tried.
    """
    trainings = [
        outcome
        for outcome in outcomes
        if (outcome.rank, outcome.seed, outcome.truncate_from) == (trained.rank, trained.seed, None)
    ]
    rates_by_step: dict[int, set[float]] = {}
    for outcome in trainings:
        rates_by_step.setdefault(outcome.end, set()).add(outcome.learning_rate)
    step = min((step for step, rates in rates_by_step.items() if len(rates) > 1), default=None)
    if step is None:
        return None
    at_step = {outcome.learning_rate: outcome for outcome in trainings if outcome.end == step}
    chosen = at_step.get(trained.learning_rate)
    if not isinstance(chosen, TrialFinished):
        return None
    is_loss = step < chosen.steps and "loss" in chosen.metrics
    metric = "loss" if is_loss else criterion.metric
    higher_is_better = criterion.higher_is_better and not is_loss
    kind = criterion.loss if is_loss else infer_metric_kind(metric, higher_is_better, criterion.loss)
    margin = criterion.margin if metric == criterion.metric else None
    if margin is None:
        margin = compute_default_margin(kind, abs(chosen.metrics[metric]), [abs(chosen.metrics[metric])])
    final_values = {
        outcome.learning_rate: outcome.metrics[criterion.metric]
        for outcome in trainings
        if isinstance(outcome, TrialFinished) and outcome.is_direct and outcome.steps == chosen.steps
    }
    candidates = []
    for rate, outcome in sorted(at_step.items()):
        value = outcome.metrics[metric] if isinstance(outcome, TrialFinished) else None
        candidate = LearningRateCandidate(learning_rate=rate, value=value, final_value=final_values.get(rate))
        if isinstance(outcome, TrialFinished) and outcome is not chosen and value is not None:
            sign = -1.0 if higher_is_better else 1.0
            estimate = estimate_trial_difference([(outcome, chosen)], metric, kind, higher_is_better)
            bounds = None if estimate is None else compute_bounds(estimate)
            candidate = candidate.model_copy(
                update={
                    "difference": sign * (value - chosen.metrics[metric]),
                    "difference_low": bounds and bounds.low,
                    "difference_high": bounds and bounds.high,
                    "is_within_margin": bounds and is_within(bounds.high, margin),
                }
            )
        candidates.append(candidate)
    answer = LearningRateAnswer(
        learning_rate=trained.learning_rate,
        rank=trained.rank,
        metric=metric,
        step=step,
        steps=chosen.steps,
        margin=margin,
        candidates=candidates,
        sentence="",
    )
    return answer.model_copy(update={"sentence": _format_sentence(answer)})


def _format_sentence(answer: LearningRateAnswer) -> str:
    when = f"at step {answer.step} of {answer.steps}" if answer.step < answer.steps else "at the end"
    others = [candidate for candidate in answer.candidates if candidate.learning_rate != answer.learning_rate]
    results = ", ".join(_format_result(candidate) for candidate in others)
    equal_rates = " and ".join(f"{candidate.learning_rate:g}" for candidate in others if candidate.is_within_margin)
    equal = f" So {equal_rates} would be within the margin of {answer.margin:.2g}." if equal_rates else ""
    return (
        f"The learning rate is {answer.learning_rate:g}. {when.capitalize()}, {answer.metric} of rank {answer.rank} was worse with the "
        f"others: {results}.{equal} This is one seed, and another seed may favor another learning rate."
    )


def _format_result(candidate: LearningRateCandidate) -> str:
    rate = f"{candidate.learning_rate:g}"
    if candidate.difference is None:
        return f"no result with {rate}"
    bounds = ""
    if candidate.difference_low is not None and candidate.difference_high is not None:
        bounds = f" (95% bounds {candidate.difference_low:+.2g} and {candidate.difference_high:+.2g})"
    return f"{candidate.difference:+.2g} with {rate}{bounds}"
