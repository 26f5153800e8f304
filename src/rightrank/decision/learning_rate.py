"""Describe the choice of the learning rate, at the step at which all of them were compared, and extrapolate beyond the tried ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from rightrank.decision.adapter import find_base
from rightrank.decision.adapter_comparison import Criterion
from rightrank.decision.comparison import compute_bounds, is_within
from rightrank.decision.table import Cell, MetricUnit, build_table, estimate_pairs
from rightrank.schema.decision import LearningRateAnswer, LearningRateCandidate
from rightrank.schema.metrics import compute_margin
from rightrank.schema.trials import TrialDiverged, TrialFinished, TrialOutcome

# From benchmarks/early_rates/judged.json: at rank 64, a rate that was chosen at a quarter ended within .005 nats of the best of four.
NEAR_BEST_GRIDS, JUDGED_GRIDS = 20, 31
EDGE_FACTOR = 3  # the factor beyond the best learning rate if no other rate suggests one


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
    compared = [outcome for outcome in at_step.values() if isinstance(outcome, TrialFinished)]
    has_means = is_loss and all(outcome.mean_losses for outcome in compared)
    searched = [outcome.use_mean_losses() for outcome in compared] if has_means else compared
    table = build_table(searched, metric, higher_is_better, loss=criterion.loss)
    current_values = {outcome.learning_rate: outcome.metrics.get(metric) for outcome in compared if has_means}
    cells = {rate: cell for (_, rate, _), cell in table.cells.items()}
    if chosen.learning_rate not in cells:
        return None
    reference = cells[chosen.learning_rate]
    unit = MetricUnit(table.kind, higher_is_better, reference.value)
    base = find_base(outcomes, replace(criterion, metric=metric, higher_is_better=higher_is_better), trained.trial_id)
    gain = None if base is None else unit.convert_difference(base.cell.loss - reference.loss)
    setting = criterion.margin if metric == criterion.metric else None
    setting = None if base is None and isinstance(setting, str) else setting
    margin = compute_margin(setting, table.kind, abs(reference.value), list(map(abs, table.list_values())), gain)
    final_values = {
        outcome.learning_rate: outcome.metrics.get(criterion.metric)
        for outcome in trainings
        if isinstance(outcome, TrialFinished) and outcome.is_direct and outcome.steps == chosen.steps
    }
    failures = {outcome.learning_rate: text for outcome in trainings if (text := _format_failure(outcome))}
    candidates = []
    for rate in sorted(at_step):
        cell = cells.get(rate)
        candidate = LearningRateCandidate(
            learning_rate=rate,
            value=cell and cell.value,
            current_value=current_values.get(rate),
            final_value=final_values.get(rate),
            failure=failures.get(rate) or (None if cell else "failed"),
        )
        if cell is not None and cell is not reference:
            candidate = _compare(candidate, cell, reference, unit, margin)
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


def _compare(
    candidate: LearningRateCandidate, cell: Cell, reference: Cell, unit: MetricUnit, margin: float
) -> LearningRateCandidate:
    """Return the candidate with its difference from the chosen learning rate, in the metric's unit."""
    difference = unit.convert_difference(cell.loss - reference.loss)
    if not cell.examples:
        return candidate.model_copy(update={"difference": difference})
    bounds = compute_bounds(estimate_pairs([(cell, reference)]))
    high = unit.convert_difference(bounds.high)
    return candidate.model_copy(
        update={
            "difference": difference,
            "difference_low": unit.convert_difference(bounds.low),
            "difference_high": high,
            "is_within_margin": is_within(high, margin),
        }
    )


def _format_failure(outcome: TrialOutcome) -> str:
    """Describe how a training ended without a result; empty for one with a result."""
    if isinstance(outcome, TrialFinished):
        return ""
    if isinstance(outcome, TrialDiverged):
        return f"diverged at step {outcome.step}"
    return "ran out of memory" if outcome.error == "out_of_memory" else "failed"


def _format_sentence(answer: LearningRateAnswer) -> str:
    when = f"at step {answer.step} of {answer.steps}" if answer.step < answer.steps else "at the end"
    others = [candidate for candidate in answer.candidates if candidate.learning_rate != answer.learning_rate]
    measured = [candidate for candidate in others if candidate.difference is not None]
    sentences = [f"The learning rate is {answer.learning_rate:g}."]
    is_mean = any(candidate.current_value is not None for candidate in answer.candidates)
    subject = f"{answer.metric} of rank {answer.rank}" + (", with the mean of its last factors," if is_mean else "")
    if measured:
        is_best = all(candidate.difference > 0 for candidate in measured if candidate.difference is not None)
        verb = "was worse with the others" if is_best else "differed with the others (below 0 is better)"
        results = ", ".join(map(_format_result, measured))
        sentences.append(f"{when.capitalize()}, {subject} {verb}: {results}.")
    sentences += [
        f"{candidate.learning_rate:g} {candidate.failure}." for candidate in others if candidate.failure is not None
    ]
    tried_rates = [candidate.learning_rate for candidate in answer.candidates]
    for edge, name in ((tried_rates[0], "lowest"), (tried_rates[-1], "highest")):
        if answer.learning_rate == edge:
            sentences.append(f"It is the {name} one that was tried: --learning-rates tries others.")
    equal_rates = [f"{candidate.learning_rate:g}" for candidate in measured if candidate.is_within_margin]
    if equal_rates:
        verb = "was" if len(equal_rates) == 1 else "were"
        sentences.append(f"{' and '.join(equal_rates)} {verb} within the margin of {answer.margin:.2g}.")
    if is_mean:
        sentences.append(
            f"Chosen like this, the rate was within .005 nats of the best of four in {NEAR_BEST_GRIDS} of {JUDGED_GRIDS} judged grids."
        )
    return " ".join([*sentences, "This is one seed, and another seed may favor another learning rate."])


def _format_result(candidate: LearningRateCandidate) -> str:
    low, high = candidate.difference_low, candidate.difference_high
    bounds = "" if low is None or high is None else f" (95% bounds {low:+.2g} and {high:+.2g})"
    return f"{candidate.difference:+.2g} with {candidate.learning_rate:g}{bounds}"


def extrapolate_rate(edge: float, inner: float, tried_rates: Iterable[float] = ()) -> float:
    """Return a learning rate beyond the edge by the step between the edge and its neighbor.

    A rate that was tried at another rank is preferred if one is near, else a round number.
    """
    if edge == 0 or inner == 0:
        return edge * EDGE_FACTOR or inner / EDGE_FACTOR
    factor = edge / inner
    lr = edge * factor
    for candidate in (*sorted(tried_rates), float(f"{lr:.0e}")):
        if candidate and abs(math.log(candidate / lr)) < abs(math.log(factor)) / 4:
            return candidate
    return float(f"{lr:.3g}")
