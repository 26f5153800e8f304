"""The first criterion: the smallest adapter that can be taken from one training at the top rank.

Every candidate is a file: the top as trained, and its truncations. Two files are compared on the same examples, so the claim
holds no seed: the only noise is which examples were drawn. Ranks are tested in a fixed sequence from the top downward, each by
the 95% upper bound of its paired difference from the top; the first that fails ends the search, so no correction for
multiplicity is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rightrank.decision.comparison import (
    CONFIDENCE,
    Estimate,
    compute_bounds,
    compute_score_range,
    estimate_mean,
    is_within,
)
from rightrank.decision.evidence import MetricUnit
from rightrank.decision.table import (
    Cell,
    build_table,
    compute_distribution,
    compute_paired_difference,
    estimate_pairs,
    find_best_point,
    format_distribution,
    number_groups,
)
from rightrank.schema.decision import AdapterAnswer, AdapterCandidate, AdapterMethod
from rightrank.schema.events import TestEvaluated
from rightrank.schema.metrics import LossKind, MetricKind, compute_default_margin, infer_metric_kind
from rightrank.schema.trials import Floats, TrialFinished, TrialOutcome

SEARCH_OPTION = "(--goal training-rank, the default)"  # what searches the training rank, in a note's words
ANSWER_FIELDS = {
    "rank",
    "method",
    "trial_id",
    "difference",
    "difference_high",
    "distribution",
}  # what an answer says of the adapter that it names
MAX_DIRECT_RANK = 4  # at these ranks a direct training can beat a truncation (docs/explanation/science.md)


@dataclass(frozen=True, slots=True)
class Criterion:
    """What candidates are compared by."""

    metric: str
    higher_is_better: bool
    margin: float | None  # None: the metric's default
    loss: LossKind = "token_loss"  # what a loss is of
    points_use_metric: bool = True  # False: values during training are losses, whatever the metric
    trusts_values: bool = False  # whether a difference without scores by example is taken as exact, as in a replay


def choose_adapter(
    outcomes: Sequence[TrialOutcome], criterion: Criterion, top_id: str | None = None
) -> AdapterAnswer | None:
    """The smallest candidate that holds; None while no training has been truncated.

    Args:
        outcomes: of a run; only finished trials count.
        top_id: the training to take candidates from; None: the best of those that were truncated.
    """
    files = build_adapter_files(outcomes, criterion)
    parents = {file.trial.truncate_from for file in files.values()}
    tops = [files[name] for name in files if name in parents and top_id in (None, name)]
    if not tops:
        return None
    top = min(tops, key=lambda file: (-file.trial.rank, file.cell.loss, file.trial.trial_id))
    children = [file for file in files.values() if file.trial.truncate_from == top.trial.trial_id]
    against = ReferenceComparison(top, files, criterion)
    chosen = _find_smallest_file(children, against, top.trial.rank)
    descending = sorted(children, key=lambda file: -file.trial.rank)
    candidates = [against.candidate(file) for file in descending]
    handed = against.candidate(chosen)
    return _build_answer(
        handed,
        top,
        against,
        [against.candidate(top), *candidates],
        _format_answer(handed, top, against, children),
        notes=_collect_notes(handed, candidates, top, against),
    )


def build_trained_answer(
    trial: TrialFinished, criterion: Criterion, reference: TrialFinished | None = None
) -> AdapterAnswer:
    """The answer where no truncation was compared: a trained adapter, against the best one of the run (itself by default)."""
    files = build_adapter_files([trial, *([] if reference is None else [reference])], criterion)
    against = ReferenceComparison(files[(reference or trial).trial_id], files, criterion)
    handed = against.candidate(files[trial.trial_id])
    sentence = f"The adapter is the one trained at rank {trial.rank}; no truncation was compared."
    return _build_answer(handed, files[trial.trial_id], against, [handed], sentence)


def _build_answer(
    handed: AdapterCandidate,
    top: AdapterFile,
    against: ReferenceComparison,
    candidates: list[AdapterCandidate],
    sentence: str,
    **further: Any,
) -> AdapterAnswer:
    return AdapterAnswer(
        **handed.model_dump(include=ANSWER_FIELDS),
        trained_rank=top.trial.rank,
        trained_id=top.trial.trial_id,
        reference_id=against.reference.trial.trial_id,
        margin=against.margin,
        candidates=candidates,
        sentence=sentence,
        **further,
    )


def prefer_direct_training(
    answer: AdapterAnswer, outcomes: Sequence[TrialOutcome], criterion: Criterion
) -> AdapterAnswer | None:
    """The answer with a direct training in place of the truncation, where one is better; None where none is.

    A training of a lower rank must hold against the same reference. One of the same rank must be shown to be better: the
    95% upper bound of its difference from the present adapter is below 0.
    """
    files = build_adapter_files(outcomes, criterion)
    if answer.reference_id not in files or answer.trial_id not in files:
        return None
    against, present = _compare_with_reference(answer, files, criterion), files[answer.trial_id]
    better: list[AdapterCandidate] = []
    for file in files.values():
        if file.method != "trained" or file.trial.rank > answer.rank or file is present:
            continue
        candidate = against.candidate(file)
        is_lower = file.trial.rank < answer.rank
        if candidate.is_within_margin and (
            is_lower or compute_bounds(against.difference(file.cell, present.cell)).high < 0
        ):
            better.append(candidate)
    if not better:
        return None
    best = min(better, key=lambda candidate: (candidate.rank, candidate.difference, candidate.trial_id))
    shown = _format_claim(best, "the reference", against)
    sentence = f"The smallest adapter within the margin has rank {best.rank}, trained at that rank: {shown}"
    return answer.model_copy(
        update={name: getattr(best, name) for name in ANSWER_FIELDS}
        | {"candidates": [*answer.candidates, best], "sentence": sentence}
    )


def compare_adapters(
    answer: AdapterAnswer, outcomes: Sequence[TrialOutcome], criterion: Criterion
) -> list[AdapterCandidate]:
    """Every adapter of a run against the reference of `answer`, by descending rank.

    Of several runs of a rank, the best is shown, and every one that the answer names: a better training of the reference's rank
    may be handed over. Where the journal lacks a run that the answer names, there are its candidates alone.
    """
    files = build_adapter_files(outcomes, criterion)
    named = {answer.trial_id, answer.reference_id, answer.trained_id}
    if not named <= files.keys():
        return answer.candidates
    against = _compare_with_reference(answer, files, criterion)
    shown = [files[trial_id] for trial_id in sorted(named, key=lambda trial_id: files[trial_id].cell.loss)]
    places = {(file.trial.rank, file.method) for file in shown}
    for file in sorted(files.values(), key=lambda file: file.cell.loss):
        place = file.trial.rank, file.method
        if file.trial.truncate_from in (None, answer.trained_id) and place not in places:
            places.add(place)
            shown.append(file)
    return [against.candidate(file) for file in sorted(shown, key=lambda file: (-file.trial.rank, file.method))]


def compute_test_difference(
    chosen: TestEvaluated | None, reference: TestEvaluated | None, criterion: Criterion
) -> tuple[float, float | None] | None:
    """`(difference from the reference, its 95% upper bound)` on the test split; None where either was not read there."""
    if chosen is None or reference is None:
        return None
    sides = [_get_test_scores(test, criterion.metric) for test in (chosen, reference)]
    sign = -1.0 if criterion.higher_is_better else 1.0
    if sides[0] is None or sides[1] is None:
        return sign * (chosen.value - reference.value), None
    (ours, weights), (theirs, _) = sides[0], sides[1]
    span = compute_score_range(infer_metric_kind(criterion.metric, criterion.higher_is_better), [ours, theirs])
    groups = number_groups(chosen.example_groups, len(weights))
    paired = estimate_mean(sign * (ours - theirs)[None, :], weights, span, groups)
    return paired.mean, compute_bounds(paired).high if paired.examples else None


def _get_test_scores(test: TestEvaluated, metric: str) -> tuple[Floats, Floats] | None:
    """`(sums, weights)` by example; None for a metric without scores by example on the test split."""
    correct = test.example_correct if metric == "accuracy" else None
    values = test.example_losses if metric == "loss" else correct or test.example_metrics.get(metric)
    if values is None:
        return None
    scores = np.asarray(values, dtype=np.float64)
    return scores, np.asarray(test.example_tokens, dtype=np.float64) if metric == "loss" else np.ones_like(scores)


@dataclass(frozen=True, slots=True)
class AdapterFile:
    trial: TrialFinished
    cell: Cell
    kind: MetricKind

    @property
    def method(self) -> AdapterMethod:
        return "trained" if self.trial.truncate_from is None else "truncated"


@dataclass(frozen=True, slots=True)
class ReferenceComparison:
    """Comparison with the reference file."""

    reference: AdapterFile
    files: Mapping[str, AdapterFile]
    criterion: Criterion

    @property
    def margin(self) -> float:
        """In the metric's unit."""
        if self.criterion.margin is not None:
            return self.criterion.margin
        values = [file.cell.value for file in self.files.values()]
        return compute_default_margin(self.reference.kind, self.reference.cell.value, values)

    def difference(self, cell: Cell, other: Cell | None = None) -> Estimate:
        """Paired over examples, metric's unit; above 0 is worse. A perplexity's is relative to the reference's."""
        return estimate_pairs([(cell, other or self.reference.cell)])

    def candidate(self, file: AdapterFile) -> AdapterCandidate:
        difference = 0.0
        low = high = 0.0 if file is self.reference else None  # 0 is exact
        spread = None
        if file.trial.trial_id != self.reference.trial.trial_id:
            bounds = compute_bounds(self.difference(file.cell))
            unit = MetricUnit(self.reference.kind, self.criterion.higher_is_better, self.reference.cell.value)
            difference = unit.difference(bounds.mean)
            if file.cell.examples:
                low, high = unit.difference(bounds.low), unit.difference(bounds.high)
                spread = compute_distribution(
                    compute_paired_difference(file.cell, self.reference.cell), self.margin, unit.difference
                )
        decides = high if high is not None else difference if self.criterion.trusts_values else math.inf
        return AdapterCandidate(
            rank=file.trial.rank,
            method=file.method,
            trial_id=file.trial.trial_id,
            value=file.cell.value,
            difference=difference,
            difference_low=low,
            difference_high=high,
            is_within_margin=is_within(decides, self.margin),
            distribution=spread,
        )


def _compare_with_reference(
    answer: AdapterAnswer, files: Mapping[str, AdapterFile], criterion: Criterion
) -> ReferenceComparison:
    """Comparison with the reference of an answer, at its margin."""
    return ReferenceComparison(files[answer.reference_id], files, replace(criterion, margin=answer.margin))


def build_adapter_files(outcomes: Sequence[TrialOutcome], criterion: Criterion) -> dict[str, AdapterFile]:
    """Finished whole trainings and truncations by trial id; of unequal numbers of examples, each by its value alone."""
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


def _format_claim(candidate: AdapterCandidate, other: str, against: ReferenceComparison) -> str:
    """What is shown of a file that holds, and how the difference spreads over examples: the end of a sentence, and another one."""
    margin = f"{against.margin:.4g}"
    if candidate.trial_id == against.reference.trial.trial_id:
        return f"it is {other} itself."
    if candidate.difference_high is None:
        return f"its held-out difference from {other} is {candidate.difference:+.2g}, within the margin of {margin}."
    over = "tokens" if against.reference.kind == "token_loss" else "examples"
    spread = "" if candidate.distribution is None else f" {format_distribution(candidate.distribution)}"
    return (
        f"it is no worse than {other} by more than the margin of {margin}, with {CONFIDENCE:.0%} confidence, on average over "
        f"held-out {over} (difference {candidate.difference:+.2g}, upper bound {candidate.difference_high:+.2g}).{spread}"
    )


def _find_smallest_file(children: Sequence[AdapterFile], against: ReferenceComparison, top_rank: int) -> AdapterFile:
    """The smallest file that holds, from the top downward."""
    chosen = against.reference
    for rank in sorted({file.trial.rank for file in children if file.trial.rank < top_rank}, reverse=True):
        holding = [file for file in children if file.trial.rank == rank and against.candidate(file).is_within_margin]
        if not holding:
            break
        chosen = min(holding, key=lambda file: file.cell.loss)
    return chosen


def _format_answer(
    answer: AdapterCandidate, top: AdapterFile, against: ReferenceComparison, children: Sequence[AdapterFile]
) -> str:
    margin = against.margin
    if answer.rank < top.trial.rank:
        return (
            f"The smallest adapter of this training within the margin has rank {answer.rank}: "
            f"{_format_claim(answer, f'the rank {top.trial.rank} adapter', against)}"
        )
    lower = max((file.trial.rank for file in children if file.trial.rank < top.trial.rank), default=None)
    why = "no lower rank is measured" if lower is None else f"rank {lower} is not shown"
    if not top.cell.examples:
        why = "without scores by example no truncation can be shown"
    return f"The adapter keeps rank {top.trial.rank}: {why} to be within the margin of {margin:.4g}."


def _collect_notes(
    answer: AdapterCandidate, candidates: Sequence[AdapterCandidate], top: AdapterFile, against: ReferenceComparison
) -> list[str]:
    notes, criterion = [], against.criterion
    failing = [cut.rank for cut in candidates if cut.rank < answer.rank and not cut.is_within_margin]
    if failing and max(failing) <= MAX_DIRECT_RANK:
        notes.append(
            f"At rank {max(failing)} a direct training can beat a truncation; the search for the training rank "
            f"{SEARCH_OPTION} tries it."
        )
    better = [cut for cut in candidates if (cut.difference_high or 0.0) < 0 and -cut.difference > against.margin]
    if quarter := [cut for cut in better if cut.rank <= top.trial.rank / 4]:
        notes.append(
            f"Rank {quarter[0].rank} is better than rank {top.trial.rank} by {-quarter[0].difference:.2g}: the top rank "
            f"overfits; train again with --ranks up to {max(cut.rank for cut in quarter)}, or fewer steps."
        )
    measures_the_metric = criterion.points_use_metric and top.trial.value_metric is None
    points = top.trial.points if measures_the_metric else []
    best = find_best_point(points, criterion.higher_is_better) if points else None
    kept = top.trial.checkpoint_step
    if kept is not None:
        notes.append(f"The best checkpoint of rank {top.trial.rank} is used: step {kept} of {top.trial.steps}.")
    elif best is not None and not is_within(abs(points[-1].value - best.value), against.margin):
        notes.append(
            f"The held-out value of rank {top.trial.rank} was best at step {best.step} of {top.trial.steps}: train again with "
            f"--max-steps {best.step}, or with --checkpoint best."
        )
    return [*notes, *filter(None, [top.cell.assumption])]


def estimate_training_ranks(answer: AdapterAnswer) -> tuple[int, int]:
    """Where the training rank probably lies, lowest and highest, by the smallest truncation that holds."""
    holding = find_smallest_truncation(answer)
    return holding if holding > MAX_DIRECT_RANK else max(1, holding // 2), min(answer.trained_rank, 2 * holding)


def find_smallest_truncation(answer: AdapterAnswer) -> int:
    """The smallest truncation within the margin of the top, from the top downward; else the top's rank."""
    smallest = answer.trained_rank
    truncated = [candidate for candidate in answer.candidates if candidate.method == "truncated"]
    for candidate in sorted(truncated, key=lambda candidate: -candidate.rank):
        if not is_within(candidate.difference, answer.margin):
            break
        smallest = candidate.rank
    return smallest


@dataclass(frozen=True, slots=True)
class Provenance:
    """How an adapter was made; enough to make it again."""

    rank: int
    trained_rank: int
    learning_rate: float
    steps: int  # of the training; 0: a custom trainer's own number
    checkpoint_step: int | None  # of the best checkpoint; None: the last
    truncation: str | None  # the method; None: it was not truncated

    def sentence(self) -> str:
        """Such as "trained at rank 64 (learning rate 0.003, 240 steps), truncated to rank 8 by K-FAC"."""
        kept = "" if self.checkpoint_step is None else f" step {self.checkpoint_step} of"
        steps = f",{kept} {self.steps} steps" if self.steps else ""
        rate = f"learning rate {self.learning_rate:g}" if self.learning_rate else ""  # 0: not known
        how = f"{rate}{steps}".removeprefix(", ")
        parts = [f"trained at rank {self.trained_rank}" + (f" ({how})" if how else "")]
        if self.truncation is not None:
            parts.append(f"truncated to rank {self.rank} by {self.truncation}")
        return ", ".join(parts)


TRUNCATION_METHODS = {"kfac": "K-FAC", "svd": "SVD"}


def build_provenance(trial: TrialFinished, finished: Sequence[TrialFinished]) -> Provenance:
    parent = next((other for other in finished if other.trial_id == trial.truncate_from), trial)
    is_truncated = trial.rank < parent.rank
    return Provenance(
        rank=trial.rank,
        trained_rank=parent.rank,
        learning_rate=parent.learning_rate,
        steps=parent.steps,
        checkpoint_step=parent.checkpoint_step,
        truncation=TRUNCATION_METHODS[trial.truncation or "svd"] if is_truncated else None,
    )
