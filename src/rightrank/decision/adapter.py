"""Adapters of a run: its trainings and truncations, compared with the reference of its answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rightrank.decision.adapter_comparison import (
    ANSWER_FIELDS,
    Criterion,
    ReferenceComparison,
    ScoredAdapter,
    build_answer,
    format_claim,
    format_steps,
)
from rightrank.decision.comparison import compute_file_bounds, compute_score_range, is_within
from rightrank.decision.table import find_best_point, number_groups
from rightrank.schema.decision import AdapterAnswer, AdapterCandidate
from rightrank.schema.events import TestEvaluated
from rightrank.schema.metrics import Margin, infer_metric_kind
from rightrank.schema.trials import Floats, TrialFinished, TrialOutcome


def score_trials(outcomes: Sequence[TrialOutcome], criterion: Criterion) -> dict[str, ScoredAdapter]:
    """Return the adapters of the finished complete trainings and truncations by trial id.

    If their numbers of examples differ, each one has only its value.
    """
    metric = criterion.metric
    trials = [
        outcome
        for outcome in outcomes
        if isinstance(outcome, TrialFinished)
        and outcome.rank > 0
        and outcome.stop_at is None
        and metric in outcome.metrics
    ]
    example_scores = {trial.trial_id: trial.get_weighted_scores(metric) for trial in trials}
    lengths = {len(items[0]) if items else 0 for items in example_scores.values()}
    return {
        trial.trial_id: ScoredAdapter.from_scores(
            trial.trial_id,
            trial.rank,
            trial.metrics[metric],
            example_scores[trial.trial_id] if len(lengths) == 1 else None,
            criterion,
            method="trained" if trial.truncate_from is None else "truncated",
            groups=trial.example_groups,
        )
        for trial in trials
    }


def find_base(
    outcomes: Iterable[TrialOutcome], criterion: Criterion, top_id: str | None = None
) -> ScoredAdapter | None:
    """Find the base of a training: its own zero update where modules other than adapters were trained, else the trial of rank 0.

    Args:
        top_id: the training; None for any.
    """
    metric = criterion.metric
    bases = [
        outcome
        for outcome in outcomes
        if isinstance(outcome, TrialFinished)
        and (outcome.rank, outcome.stop_at) == (0, None)
        and (top_id is None or outcome.truncate_from in (None, top_id))
        and metric in outcome.metrics
    ]
    if not bases:
        return None
    trial = max(bases, key=lambda base: base.truncate_from is not None)
    scores = trial.get_weighted_scores(metric)
    return ScoredAdapter.from_scores(
        trial.trial_id, 0, trial.metrics[metric], scores, criterion, groups=trial.example_groups
    )


def describe_checkpoint(trial: TrialFinished, criterion: Criterion, margin: float) -> list[str]:
    """Say which evaluation of the training at the top rank is used, or that an earlier one was better."""
    points = trial.points if criterion.points_use_metric and trial.value_metric is None else []
    best = find_best_point(points, criterion.higher_is_better) if points else None
    if trial.checkpoint_step is not None:
        mean = ", the mean of the factors since the warm-up" if trial.checkpoint_is_mean else ""
        return [
            f"The best checkpoint of rank {trial.rank} is used: step {trial.checkpoint_step} of {trial.steps}{mean}."
        ]
    if best is None or is_within(abs(points[-1].value - best.value), margin):
        return []
    return [
        f"The held-out value of rank {trial.rank} was best at step {best.step} of {trial.steps}: train again with "
        f"--max-steps {best.step}, or with --set checkpoint=best."
    ]


def build_trained_answer(
    trial: TrialFinished,
    criterion: Criterion,
    reference: TrialFinished | None = None,
    outcomes: Sequence[TrialOutcome] = (),
) -> AdapterAnswer:
    """Return the answer for a trained adapter if no truncation was compared.

    Args:
        reference: the best adapter of the run; None: the trained adapter itself.
        outcomes: the outcomes of the run, for its base.
    """
    reference = reference or trial
    adapters = score_trials([trial, reference], criterion)
    base = find_base(outcomes, criterion, reference.trial_id)
    comparison = ReferenceComparison(adapters[reference.trial_id], adapters, criterion, base)
    adapter = adapters[trial.trial_id]
    chosen = comparison.build_candidate(adapter)
    sentence = f"The adapter is the one trained at rank {trial.rank}; no truncation was compared."
    return build_answer(chosen, adapter, comparison, [chosen], sentence)


def prefer_direct_training(
    answer: AdapterAnswer, outcomes: Sequence[TrialOutcome], criterion: Criterion
) -> AdapterAnswer | None:
    """Return the answer with a direct training in place of the truncation, or None if no direct training is better.

    A training at a lower rank must be within the margin of the same reference. One at the same rank must be shown to be better:
    the 95% upper bound of its difference from the present adapter is below 0.
    """
    adapters = score_trials(outcomes, criterion)
    if answer.reference_id not in adapters or answer.trial_id not in adapters:
        return None
    comparison, present = _compare_with_reference(answer, outcomes, criterion), adapters[answer.trial_id]
    better: list[AdapterCandidate] = []
    for adapter in adapters.values():
        if adapter.method != "trained" or adapter.rank > answer.rank or adapter is present:
            continue
        candidate, is_lower = comparison.build_candidate(adapter), adapter.rank < answer.rank
        if candidate.is_within_margin and (is_lower or comparison.compute_bounds(adapter.cell, present.cell).high < 0):
            better.append(candidate)
    if not better:
        return None
    best = min(better, key=lambda candidate: (candidate.rank, candidate.difference, candidate.trial_id))
    steps = format_steps(answer.staircase, best.rank)
    claim = format_claim(best, f"rank {comparison.reference.rank}", comparison)
    return answer.model_copy(
        update={name: getattr(best, name) for name in ANSWER_FIELDS}
        | {"candidates": [*answer.candidates, best], "sentence": f"{claim} It was trained at that rank.{steps}"}
    )


def compare_adapters(
    answer: AdapterAnswer, outcomes: Sequence[TrialOutcome], criterion: Criterion
) -> list[AdapterCandidate]:
    """Compare every adapter of a run with the reference of `answer`, by descending rank.

    At each rank the best trial is shown, and every one that the answer names, since a better training at the reference's rank may be
    handed over. If the journal lacks a trial that the answer names, only the answer's candidates are returned.
    """
    adapters = score_trials(outcomes, criterion)
    named_ids = {answer.trial_id, answer.reference_id, answer.trained_id}
    if not named_ids <= adapters.keys():
        return answer.candidates
    parents = {outcome.trial_id: outcome.truncate_from for outcome in outcomes}
    comparison = _compare_with_reference(answer, outcomes, criterion)
    shown = [adapters[trial_id] for trial_id in sorted(named_ids, key=lambda trial_id: adapters[trial_id].cell.loss)]
    shown_keys = {(adapter.rank, adapter.method) for adapter in shown}
    for adapter in sorted(adapters.values(), key=lambda adapter: adapter.cell.loss):
        key = adapter.rank, adapter.method
        if parents[adapter.name] in (None, answer.trained_id) and key not in shown_keys:
            shown_keys.add(key)
            shown.append(adapter)
    return [
        comparison.build_candidate(adapter)
        for adapter in sorted(shown, key=lambda adapter: (-adapter.rank, adapter.method))
    ]


def compute_test_difference(
    chosen: TestEvaluated | None, reference: TestEvaluated | None, criterion: Criterion
) -> tuple[float, float | None] | None:
    """Return the difference from the reference on the test split with its 95% upper bound; None if either has no test value."""
    if chosen is None or reference is None:
        return None
    sides = [_get_test_scores(test, criterion.metric) for test in (chosen, reference)]
    sign = -1.0 if criterion.higher_is_better else 1.0
    if sides[0] is None or sides[1] is None:
        return sign * (chosen.value - reference.value), None
    (ours, weights), (theirs, _) = sides[0], sides[1]
    score_range = compute_score_range(infer_metric_kind(criterion.metric, criterion.higher_is_better), [ours, theirs])
    groups = number_groups(chosen.example_groups, len(weights))
    if len(weights) < 2:
        return float(sign * (ours - theirs).sum() / weights.sum()), None
    bounds = compute_file_bounds(sign * (ours - theirs), weights, score_range, groups)
    return bounds.mean, bounds.high


def _get_test_scores(test: TestEvaluated, metric: str) -> tuple[Floats, Floats] | None:
    """Return `(sums, weights)` by example, or None for a metric without example scores on the test split."""
    correct = test.example_correct if metric == "accuracy" else None
    values = test.example_losses if metric == "loss" else correct or test.example_metrics.get(metric)
    if values is None:
        return None
    scores = np.asarray(values, dtype=np.float64)
    return scores, np.asarray(test.example_tokens, dtype=np.float64) if metric == "loss" else np.ones_like(scores)


def _compare_with_reference(
    answer: AdapterAnswer, outcomes: Sequence[TrialOutcome], criterion: Criterion
) -> ReferenceComparison:
    """Return the comparison with the reference of an answer, at the answer's margin."""
    adapters = score_trials(outcomes, criterion)
    share, base = answer.margin_share, find_base(outcomes, criterion, answer.trained_id)
    margin: Margin = answer.margin if share is None else f"{100 * share:g}%"
    return ReferenceComparison(adapters[answer.reference_id], adapters, replace(criterion, margin=margin), base)


@dataclass(frozen=True, slots=True)
class Provenance:
    """The steps that produced an adapter; enough to reproduce it."""

    rank: int
    trained_rank: int
    learning_rate: float
    steps: int  # of the training; 0: a custom trainer decides
    checkpoint_step: int | None  # of the best checkpoint; None: the last
    truncation: str | None  # the method; None: it was not truncated
    checkpoint_is_mean: bool = False  # whether the checkpoint is the mean of the factors since the warm-up

    def format_sentence(self) -> str:
        """Format a sentence such as "trained at rank 64 (learning rate 0.003, 240 steps), truncated to rank 8 by K-FAC"."""
        checkpoint = "" if self.checkpoint_step is None else f" step {self.checkpoint_step} of"
        checkpoint = f" the mean of the factors at{checkpoint}" if self.checkpoint_is_mean else checkpoint
        steps = f",{checkpoint} {self.steps} steps" if self.steps else ""
        rate = f"learning rate {self.learning_rate:g}" if self.learning_rate else ""  # 0: unknown
        details = f"{rate}{steps}".removeprefix(", ")
        clauses = [f"trained at rank {self.trained_rank}" + (f" ({details})" if details else "")]
        if self.truncation is not None:
            clauses.append(f"truncated to rank {self.rank} by {self.truncation}")
        return ", ".join(clauses)


TRUNCATION_METHODS = {"kfac": "K-FAC", "svd": "SVD"}


def build_provenance(trial: TrialFinished, finished: Sequence[TrialFinished]) -> Provenance:
    """Return the provenance of a trial's adapter."""
    parent = next((candidate for candidate in finished if candidate.trial_id == trial.truncate_from), trial)
    is_truncated = trial.rank < parent.rank
    return Provenance(
        rank=trial.rank,
        trained_rank=parent.rank,
        learning_rate=parent.learning_rate,
        steps=parent.steps,
        checkpoint_step=parent.checkpoint_step,
        truncation=TRUNCATION_METHODS[trial.truncation or "svd"] if is_truncated else None,
        checkpoint_is_mean=parent.checkpoint_is_mean,
    )
