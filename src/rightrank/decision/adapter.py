"""Choose the deployment rank: the smallest adapter that can be truncated from one training at the top rank.

Every candidate is an adapter: the top one as trained, and its truncations. Two adapters are compared on the same examples, so the
claim does not depend on seeds: the only noise is which examples were drawn. Ranks are tested in a fixed sequence from the top
downward, each by the 95% upper bound of its paired difference from the top. The first failure ends the search, so no correction
for multiplicity is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rightrank.decision.comparison import (
    CONFIDENCE,
    Bounds,
    compute_file_bounds,
    compute_score_range,
    is_within,
)
from rightrank.decision.table import (
    Cell,
    MetricUnit,
    build_table,
    compute_distribution,
    compute_paired_difference,
    find_best_point,
    format_distribution,
    number_groups,
)
from rightrank.schema.decision import AdapterAnswer, AdapterCandidate, AdapterMethod
from rightrank.schema.events import TestEvaluated
from rightrank.schema.metrics import LossKind, MetricKind, compute_default_margin, infer_metric_kind
from rightrank.schema.trials import Floats, TrialFinished, TrialOutcome

SEARCH_OPTION = "(--goal training-rank)"  # the option that searches the training rank, for notes
ANSWER_FIELDS = {
    "rank",
    "method",
    "trial_id",
    "difference",
    "difference_high",
    "distribution",
}  # fields that an answer copies from the chosen candidate
MAX_DIRECT_RANK = 4  # at these ranks a direct training can beat a truncation (docs/explanation/science.md)


@dataclass(frozen=True, slots=True)
class Criterion:
    """The metric and the margin by which candidates are compared."""

    metric: str
    higher_is_better: bool
    margin: float | None  # None: the metric's default
    loss: LossKind = "token_loss"  # the kind of a loss
    points_use_metric: bool = True  # False: values during training are losses for every metric
    trusts_values: bool = False  # whether a difference without example scores is treated as exact, as in a replay


def choose_adapter(
    outcomes: Sequence[TrialOutcome], criterion: Criterion, top_id: str | None = None
) -> AdapterAnswer | None:
    """Choose the smallest candidate within the margin, or return None if no training has been truncated.

    Args:
        outcomes: the outcomes of a run; only finished trials count.
        top_id: the training whose truncations are the candidates; None: the best one that was truncated.
    """
    files = build_adapter_files(outcomes, criterion)
    parents = {file.trial.truncate_from for file in files.values()}
    tops = [files[name] for name in files if name in parents and top_id in (None, name)]
    if not tops:
        return None
    top = min(tops, key=lambda file: (-file.trial.rank, file.cell.loss, file.trial.trial_id))
    children = [file for file in files.values() if file.trial.truncate_from == top.trial.trial_id]
    reference_comparison = ReferenceComparison(top, files, criterion)
    chosen = _find_smallest_file(children, reference_comparison, top.trial.rank)
    descending = sorted(children, key=lambda file: -file.trial.rank)
    candidates = [reference_comparison.build_candidate(file) for file in descending]
    chosen_candidate = reference_comparison.build_candidate(chosen)
    return _build_answer(
        chosen_candidate,
        top,
        reference_comparison,
        [reference_comparison.build_candidate(top), *candidates],
        _format_answer(chosen_candidate, top, reference_comparison, children),
        notes=_collect_notes(chosen_candidate, candidates, top, reference_comparison),
    )


def build_trained_answer(
    trial: TrialFinished, criterion: Criterion, reference: TrialFinished | None = None
) -> AdapterAnswer:
    """Return the answer for a trained adapter if no truncation was compared.

    The reference is the best adapter of the run, by default the trained adapter itself.
    """
    files = build_adapter_files([trial, *([] if reference is None else [reference])], criterion)
    reference_comparison = ReferenceComparison(files[(reference or trial).trial_id], files, criterion)
    chosen = reference_comparison.build_candidate(files[trial.trial_id])
    sentence = f"The adapter is the one trained at rank {trial.rank}; no truncation was compared."
    return _build_answer(chosen, files[trial.trial_id], reference_comparison, [chosen], sentence)


def _build_answer(
    chosen: AdapterCandidate,
    top: AdapterFile,
    reference_comparison: ReferenceComparison,
    candidates: list[AdapterCandidate],
    sentence: str,
    **optional_fields: Any,
) -> AdapterAnswer:
    return AdapterAnswer(
        **chosen.model_dump(include=ANSWER_FIELDS),
        trained_rank=top.trial.rank,
        trained_id=top.trial.trial_id,
        reference_id=reference_comparison.reference.trial.trial_id,
        margin=reference_comparison.margin,
        candidates=candidates,
        sentence=sentence,
        **optional_fields,
    )


def prefer_direct_training(
    answer: AdapterAnswer, outcomes: Sequence[TrialOutcome], criterion: Criterion
) -> AdapterAnswer | None:
    """Return the answer with a direct training in place of the truncation, or None if no direct training is better.

    A training at a lower rank must be within the margin of the same reference. One at the same rank must be shown to be better:
    the 95% upper bound of its difference from the present adapter is below 0.
    """
    files = build_adapter_files(outcomes, criterion)
    if answer.reference_id not in files or answer.trial_id not in files:
        return None
    reference_comparison, present = _compare_with_reference(answer, files, criterion), files[answer.trial_id]
    better: list[AdapterCandidate] = []
    for file in files.values():
        if file.method != "trained" or file.trial.rank > answer.rank or file is present:
            continue
        candidate = reference_comparison.build_candidate(file)
        is_lower = file.trial.rank < answer.rank
        if candidate.is_within_margin and (
            is_lower or reference_comparison.compute_bounds(file.cell, present.cell).high < 0
        ):
            better.append(candidate)
    if not better:
        return None
    best = min(better, key=lambda candidate: (candidate.rank, candidate.difference, candidate.trial_id))
    shown = _format_claim(best, "the reference", reference_comparison)
    sentence = f"The smallest adapter within the margin has rank {best.rank}, trained at that rank: {shown}"
    return answer.model_copy(
        update={name: getattr(best, name) for name in ANSWER_FIELDS}
        | {"candidates": [*answer.candidates, best], "sentence": sentence}
    )


def compare_adapters(
    answer: AdapterAnswer, outcomes: Sequence[TrialOutcome], criterion: Criterion
) -> list[AdapterCandidate]:
    """Compare every adapter of a run with the reference of `answer`, by descending rank.

    At each rank the best trial is shown, and every one that the answer names, since a better training at the reference's rank may be
    handed over. If the journal lacks a trial that the answer names, only the answer's candidates are returned.
    """
    files = build_adapter_files(outcomes, criterion)
    named_ids = {answer.trial_id, answer.reference_id, answer.trained_id}
    if not named_ids <= files.keys():
        return answer.candidates
    reference_comparison = _compare_with_reference(answer, files, criterion)
    shown = [files[trial_id] for trial_id in sorted(named_ids, key=lambda trial_id: files[trial_id].cell.loss)]
    shown_keys = {(file.trial.rank, file.method) for file in shown}
    for file in sorted(files.values(), key=lambda file: file.cell.loss):
        key = file.trial.rank, file.method
        if file.trial.truncate_from in (None, answer.trained_id) and key not in shown_keys:
            shown_keys.add(key)
            shown.append(file)
    return [
        reference_comparison.build_candidate(file)
        for file in sorted(shown, key=lambda file: (-file.trial.rank, file.method))
    ]


def describe_missing_gain(trial: TrialFinished, base: TrialFinished | None, criterion: Criterion, margin: float) -> str:
    """Say that the base model is within the margin of an adapter; empty if the adapter is better, or the base was not measured."""
    if base is None:
        return ""
    table = build_table([base, trial], criterion.metric, criterion.higher_is_better, loss=criterion.loss)
    cells = {rank: cell for (rank, *_), cell in table.cells.items()}
    if len(cells) < 2:
        return ""
    unit = MetricUnit(table.kind, criterion.higher_is_better, cells[trial.rank].value)
    worse_by = compute_paired_difference(cells[0], cells[trial.rank])
    difference, bounds_text = round(unit.convert_difference(worse_by.loss), 12) + 0.0, ""
    if not is_within(difference, margin):
        return ""
    if cells[0].examples:
        bounds = compute_file_bounds(worse_by.sums, worse_by.weights, worse_by.score_range, worse_by.groups)
        low, high = unit.convert_difference(bounds.low), unit.convert_difference(bounds.high)
        bounds_text = f" (95% bounds {low:+.2g} and {high:+.2g})"
    return (
        f"No gain is shown: the base model differs from it by {difference:+.2g}{bounds_text}, and the margin is {margin:.4g}. Check that the "
        "data match the task; then train at higher learning rates, or for more steps."
    )


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


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A finished training or truncation with its scores."""

    trial: TrialFinished
    cell: Cell
    kind: MetricKind

    @property
    def method(self) -> AdapterMethod:
        return "trained" if self.trial.truncate_from is None else "truncated"


@dataclass(frozen=True, slots=True)
class ReferenceComparison:
    """A comparison of adapters with a reference adapter."""

    reference: AdapterFile
    files: Mapping[str, AdapterFile]
    criterion: Criterion

    @property
    def margin(self) -> float:
        """Return the margin in the metric's unit."""
        if self.criterion.margin is not None:
            return self.criterion.margin
        values = [file.cell.value for file in self.files.values()]
        return compute_default_margin(self.reference.kind, self.reference.cell.value, values)

    def compute_bounds(self, cell: Cell, reference: Cell | None = None) -> Bounds:
        """Compute the difference from the reference with its bounds, paired over examples; above 0 is worse.

        The bounds are those with which `compare` compares two adapters. Without scores by example they are the mean.
        """
        worse_by = compute_paired_difference(cell, reference or self.reference.cell)
        if not cell.examples:
            return Bounds(worse_by.loss, worse_by.loss, worse_by.loss)
        return compute_file_bounds(worse_by.sums, worse_by.weights, worse_by.score_range, worse_by.groups)

    def build_candidate(self, file: AdapterFile) -> AdapterCandidate:
        difference = 0.0
        low = high = 0.0 if file is self.reference else None  # 0 is exact
        distribution = None
        if file.trial.trial_id != self.reference.trial.trial_id:
            bounds = self.compute_bounds(file.cell)
            unit = MetricUnit(self.reference.kind, self.criterion.higher_is_better, self.reference.cell.value)
            difference = unit.convert_difference(bounds.mean)
            if file.cell.examples:
                low, high = unit.convert_difference(bounds.low), unit.convert_difference(bounds.high)
                distribution = compute_distribution(
                    compute_paired_difference(file.cell, self.reference.cell), self.margin, unit.convert_difference
                )
        tested_bound = high if high is not None else difference if self.criterion.trusts_values else math.inf
        return AdapterCandidate(
            rank=file.trial.rank,
            method=file.method,
            trial_id=file.trial.trial_id,
            value=file.cell.value,
            difference=difference,
            difference_low=low,
            difference_high=high,
            is_within_margin=is_within(tested_bound, self.margin),
            distribution=distribution,
        )


def _compare_with_reference(
    answer: AdapterAnswer, files: Mapping[str, AdapterFile], criterion: Criterion
) -> ReferenceComparison:
    """Return the comparison with the reference of an answer, at the answer's margin."""
    return ReferenceComparison(files[answer.reference_id], files, replace(criterion, margin=answer.margin))


def build_adapter_files(outcomes: Sequence[TrialOutcome], criterion: Criterion) -> dict[str, AdapterFile]:
    """Return the finished complete trainings and truncations by trial id.

    If their numbers of examples differ, each one has only its value.
    """
    trials = [
        outcome
        for outcome in outcomes
        if isinstance(outcome, TrialFinished)
        and outcome.rank > 0
        and outcome.stop_at is None
        and criterion.metric in outcome.metrics
    ]
    files: dict[str, AdapterFile] = {}
    lengths = {len(items[0]) if (items := trial.get_weighted_scores(criterion.metric)) else 0 for trial in trials}
    for trial in trials:
        bare = trial if len(lengths) == 1 else trial.model_copy(update={"example_losses": [], "example_tokens": []})
        table = build_table([bare], criterion.metric, criterion.higher_is_better, loss=criterion.loss)
        files[trial.trial_id] = AdapterFile(trial, next(iter(table.cells.values())), table.kind)
    return files


def _format_claim(candidate: AdapterCandidate, reference_name: str, reference_comparison: ReferenceComparison) -> str:
    """Format the evidence for an adapter within the margin as the end of a sentence, and a sentence on the distribution."""
    margin = f"{reference_comparison.margin:.4g}"
    if candidate.trial_id == reference_comparison.reference.trial.trial_id:
        return f"it is {reference_name} itself."
    if candidate.difference_high is None:
        return f"its held-out difference from {reference_name} is {candidate.difference:+.2g}, within the margin of {margin}."
    sampling_unit = "tokens" if reference_comparison.reference.kind == "token_loss" else "examples"
    distribution_sentence = "" if candidate.distribution is None else f" {format_distribution(candidate.distribution)}"
    return (
        f"it is no worse than {reference_name} by more than the margin of {margin}, with {CONFIDENCE:.0%} confidence, on average over "
        f"held-out {sampling_unit} (difference {candidate.difference:+.2g}, upper bound {candidate.difference_high:+.2g}).{distribution_sentence}"
    )


def _find_smallest_file(
    children: Sequence[AdapterFile], reference_comparison: ReferenceComparison, top_rank: int
) -> AdapterFile:
    """Find the smallest adapter within the margin, testing ranks from the top downward."""
    chosen = reference_comparison.reference
    for rank in sorted({file.trial.rank for file in children if file.trial.rank < top_rank}, reverse=True):
        passing = [
            file
            for file in children
            if file.trial.rank == rank and reference_comparison.build_candidate(file).is_within_margin
        ]
        if not passing:
            break
        chosen = min(passing, key=lambda file: file.cell.loss)
    return chosen


def _format_answer(
    answer: AdapterCandidate,
    top: AdapterFile,
    reference_comparison: ReferenceComparison,
    children: Sequence[AdapterFile],
) -> str:
    margin = reference_comparison.margin
    if answer.rank < top.trial.rank:
        return (
            f"The smallest adapter of this training within the margin has rank {answer.rank}: "
            f"{_format_claim(answer, f'the rank {top.trial.rank} adapter', reference_comparison)}"
        )
    lower = max((file.trial.rank for file in children if file.trial.rank < top.trial.rank), default=None)
    reason = "no lower rank is measured" if lower is None else f"rank {lower} is not shown"
    if not top.cell.examples:
        reason = "without example scores no truncation can be shown"
    return f"The adapter keeps rank {top.trial.rank}: {reason} to be within the margin of {margin:.4g}."


def _collect_notes(
    answer: AdapterCandidate,
    candidates: Sequence[AdapterCandidate],
    top: AdapterFile,
    reference_comparison: ReferenceComparison,
) -> list[str]:
    notes, criterion = [], reference_comparison.criterion
    failed_ranks = [
        candidate.rank for candidate in candidates if candidate.rank < answer.rank and not candidate.is_within_margin
    ]
    if failed_ranks and max(failed_ranks) <= MAX_DIRECT_RANK:
        notes.append(
            f"At rank {max(failed_ranks)} a direct training can beat a truncation; the search for the training rank "
            f"{SEARCH_OPTION} tries it."
        )
    better = [
        candidate
        for candidate in candidates
        if (candidate.difference_high or 0.0) < 0 and -candidate.difference > reference_comparison.margin
    ]
    if small_better := [candidate for candidate in better if candidate.rank <= top.trial.rank / 4]:
        notes.append(
            f"Rank {small_better[0].rank} is better than rank {top.trial.rank} by {-small_better[0].difference:.2g}: the top rank "
            f"overfits; train again with --ranks up to {max(candidate.rank for candidate in small_better)}, or fewer steps."
        )
    uses_metric = criterion.points_use_metric and top.trial.value_metric is None
    points = top.trial.points if uses_metric else []
    best = find_best_point(points, criterion.higher_is_better) if points else None
    checkpoint_step = top.trial.checkpoint_step
    if checkpoint_step is not None:
        mean = ", the mean of the factors since the warm-up" if top.trial.checkpoint_is_mean else ""
        notes.append(
            f"The best checkpoint of rank {top.trial.rank} is used: step {checkpoint_step} of {top.trial.steps}{mean}."
        )
    elif best is not None and not is_within(abs(points[-1].value - best.value), reference_comparison.margin):
        notes.append(
            f"The held-out value of rank {top.trial.rank} was best at step {best.step} of {top.trial.steps}: train again with "
            f"--max-steps {best.step}, or with --checkpoint best."
        )
    return [*notes, *filter(None, [top.cell.assumption])]


def estimate_training_ranks(answer: AdapterAnswer) -> tuple[int, int]:
    """Return the lowest and the highest probable training rank, derived from the smallest truncation within the margin."""
    holding = find_smallest_truncation(answer)
    return holding if holding > MAX_DIRECT_RANK else max(1, holding // 2), min(answer.trained_rank, 2 * holding)


def find_smallest_truncation(answer: AdapterAnswer) -> int:
    """Find the rank of the smallest truncation whose mean is within the margin, from the top downward; else return the top rank."""
    smallest_rank = answer.trained_rank
    truncated = [candidate for candidate in answer.candidates if candidate.method == "truncated"]
    for candidate in sorted(truncated, key=lambda candidate: -candidate.rank):
        if not is_within(candidate.difference, answer.margin):
            break
        smallest_rank = candidate.rank
    return smallest_rank


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
