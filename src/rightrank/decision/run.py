"""Adapters and learning rates of a run, and the decision that its records support."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from rightrank.decision.adapter import (
    ANSWER_FIELDS,
    Criterion,
    ReferenceComparison,
    ScoredAdapter,
    build_answer,
    format_claim,
    format_steps,
)
from rightrank.decision.comparison import compute_bounds, compute_file_bounds, compute_score_range, is_within
from rightrank.decision.ranks import DEFAULT_CONFIDENCE
from rightrank.decision.rule import decide_table
from rightrank.decision.table import (
    Cell,
    MetricUnit,
    ScoreTable,
    build_table,
    estimate_pairs,
    find_best_point,
    number_groups,
)
from rightrank.schema.decision import (
    AdapterAnswer,
    AdapterCandidate,
    Decision,
    LearningRateAnswer,
    LearningRateCandidate,
)
from rightrank.schema.errors import ResultsError
from rightrank.schema.events import Records, RunStarted, TestEvaluated
from rightrank.schema.metrics import Checkpoint, Margin, compute_margin, format_unknown_direction, infer_metric_kind
from rightrank.schema.trials import (
    Floats,
    TrialDiverged,
    TrialFinished,
    TrialOutcome,
    count_added_steps,
)


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


# From benchmarks/early_rates/judged.json: at rank 64, a rate that was chosen at a quarter ended within .005 nats of the best of four.
NEAR_BEST_GRIDS, JUDGED_GRIDS = 20, 31


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


def decide_run(records: Records) -> Decision:
    """Decide at the margin and by the metric of the run.

    Raises:
        ResultsError: fewer than two ranks have a finished trial.
    """
    return decide_by_metric(records, list_comparable_outcomes(records), records.started.metric, records.settings.margin)


def decide_by_metric(
    records: Records,
    outcomes: Sequence[TrialOutcome],
    metric: str,
    margin: Margin | None = None,
    *,
    higher: bool | None = None,
    confidence: float | None = None,
    checkpoint: Checkpoint | None = None,
) -> Decision:
    """Decide by one of the run's metrics, at the run's checkpoint unless one is given.

    Raises:
        ResultsError: fewer than two ranks have the metric, or its direction is not known.
    """
    settings = records.settings
    return decide_table(
        build_run_table(records, outcomes, metric, higher),
        margin,
        checkpoint=checkpoint or settings.checkpoint,
        confidence=confidence or DEFAULT_CONFIDENCE,
    )


def list_metrics(records: Records) -> list[str]:
    """List the metrics of the run's trials; the deciding metric comes first."""
    names = dict.fromkeys(name for trial in records.list_finished() for name in trial.metrics)
    return list(dict.fromkeys([records.started.metric, *names]))


def build_run_table(
    records: Records,
    outcomes: Sequence[TrialOutcome] | None = None,
    metric: str | None = None,
    higher: bool | None = None,
) -> ScoreTable:
    """Build the table of a run's scores by `metric`, by default the deciding one.

    `higher` says whether higher is better, if given.

    Raises:
        ResultsError: neither the caller, nor the run, nor the metric's name has the direction.
    """
    started = records.started
    outcomes = list_comparable_outcomes(records) if outcomes is None else outcomes
    if started.data.form == "custom":  # The example scores of a custom trainer belong to the deciding metric.
        return build_table(outcomes, started.metric, started.higher_is_better if higher is None else higher)
    metric = metric or started.metric
    if higher is None:
        higher = get_metric_direction(started, metric)
    if higher is None:
        raise ResultsError(f"{format_unknown_direction(metric)}; give --higher-is-better or --lower-is-better")
    evaluation_metric = started.points_metric or started.metric
    return build_table(
        outcomes, metric, higher, evaluation_metric, partial_outcomes=records.outcomes, loss=started.data.loss_kind
    )


def list_tried_rates(records: Records) -> set[float]:
    """List the learning rates of all trainings, including those that the search added to the settings."""
    return {outcome.learning_rate for outcome in records.outcomes if outcome.rank > 0 and outcome.learning_rate > 0}


def get_metric_direction(started: RunStarted, metric: str) -> bool | None:
    """Return whether higher is better by a metric of the run, from its settings or else its name; None: not known."""
    if metric == started.metric:
        return started.higher_is_better
    return started.select_settings.get_direction(metric)


def list_comparable_outcomes(records: Records) -> list[TrialOutcome]:
    """List the outcomes that may be compared: complete trainings, and the base with their trained heads if there are any."""
    zero = [outcome for outcome in records.outcomes if outcome.rank == 0 and outcome.truncate_from is not None][-1:]
    direct = [outcome for outcome in records.outcomes if outcome.is_direct and (outcome.rank > 0 or not zero)]
    return exclude_longer_trainings([*zero, *direct])


Outcome = TypeVar("Outcome", bound=TrialOutcome)


def exclude_longer_trainings(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Keep the shortest training of each rank, learning rate and seed.

    The training of twice the steps, which goal "best-adapter" makes, is compared with the others as an adapter only.
    """
    # Truncations have no steps, and are compared with each other alone.
    keys = [(outcome.rank, outcome.learning_rate, outcome.seed, outcome.truncate_from is None) for outcome in outcomes]
    fewest: dict[tuple[int, float, int, bool], int] = {}
    for key, outcome in zip(keys, outcomes, strict=True):
        fewest[key] = min(outcome.steps, fewest.get(key, outcome.steps))
    return [outcome for key, outcome in zip(keys, outcomes, strict=True) if outcome.steps == fewest[key]]


def find_best_trial(records: Records, decision: Decision, rank: int) -> TrialFinished:
    """Find the trial with the best held-out value over seeds, at the rank's best learning rate."""
    evidence = next(evidence for evidence in decision.ranks if evidence.rank == rank)
    trials = [trial for trial in records.list_finished() if trial.trial_id in evidence.trial_ids]
    sign = -1 if decision.higher_is_better else 1
    return min(trials, key=lambda trial: (sign * trial.value, trial.seed))


def add_base_note(decision: Decision, records: Records) -> Decision:
    """Say in the decision of a custom trainer's run that the base was not measured."""
    if not records.started.is_custom_trainer or any(trial.rank == 0 for trial in records.list_finished()):
        return decision
    failed = next((trial for trial in records.outcomes if trial.rank == 0), None)
    reason = "add 0 to the ranks" if failed is None or isinstance(failed, TrialFinished) else failed.reason
    return decision.model_copy(
        update={"sentence": f"{decision.sentence} The base was not measured, so no gain over it is shown ({reason})."}
    )


def decide_if_possible(records: Records) -> Decision | None:
    """Decide, or return None while fewer than two ranks have a result."""
    try:
        return decide_run(records)
    except ResultsError:
        return None


def build_criterion(records: Records) -> Criterion:
    """Return the metric and the margin of the run."""
    started = records.started
    return Criterion(
        started.metric,
        started.higher_is_better,
        records.settings.margin,
        started.data.loss_kind,
        points_use_metric=(started.points_metric or started.metric) == started.metric,
    )


def compare_run_adapters(records: Records) -> list[AdapterCandidate]:
    """Compare every adapter of the run with the reference of its answer; empty before the first answer."""
    if not records.adapters:
        return []
    return compare_adapters(records.adapters[-1].answer, records.outcomes, build_criterion(records))


def count_trainings(records: Records) -> float:
    """Return the optimizer steps of all outcomes divided by those of a complete training.

    An arm that resumes another one counts only its added steps.
    """
    by_id = records.by_id
    finished = [trial for trial in by_id.values() if trial.rank > 0]
    trainings = exclude_longer_trainings([trial for trial in finished if trial.truncate_from is None])
    steps_per_training = max([0, *(trial.steps for trial in trainings)])
    steps = sum(count_added_steps(trial, by_id) for trial in finished)
    return round(steps / steps_per_training, 3) if steps_per_training else float(len(finished))
