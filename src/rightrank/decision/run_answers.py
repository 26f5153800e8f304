"""Adapters and learning rates of a run, and the decision that its records support."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from rightrank.decision.adapter import (
    ANSWER_FIELDS,
    Criterion,
    ReferenceComparison,
    ScoredAdapter,
    build_answer,
    format_claim,
    format_steps,
)
from rightrank.decision.comparison import INTERVAL
from rightrank.decision.rule import DEFAULT_CONFIDENCE, decide_table
from rightrank.decision.table import (
    ScoreTable,
    build_table,
)
from rightrank.schema.errors import ResultsError
from rightrank.schema.events import Records, TestEvaluated
from rightrank.schema.metrics import Checkpoint, Margin, format_unknown_direction
from rightrank.schema.results import (
    AdapterAnswer,
    AdapterCandidate,
    Decision,
    LearningRateAnswer,
    LearningRateCandidate,
)
from rightrank.schema.trials import (
    TrialFinished,
    TrialOutcome,
    exclude_longer_trainings,
)


def score_trials(outcomes: Sequence[TrialOutcome], criterion: Criterion) -> dict[str, ScoredAdapter]:
    """Return the adapters of the finished complete trainings and truncations by trial id."""
    finished = [outcome for outcome in outcomes if isinstance(outcome, TrialFinished)]
    return _score_trials([trial for trial in finished if trial.rank > 0 and trial.stop_at is None], criterion)


def _score_trials(trials: Iterable[TrialFinished], criterion: Criterion) -> dict[str, ScoredAdapter]:
    """Return the trials that have the metric by id. If their numbers of examples differ, each one has only its value."""
    metric = criterion.metric
    measured = [(trial, trial.get_weighted_scores(metric)) for trial in trials if metric in trial.metrics]
    is_paired = len({len(scores[0]) if scores else 0 for _, scores in measured}) == 1
    return {
        trial.trial_id: ScoredAdapter.from_scores(
            trial.trial_id,
            trial.rank,
            trial.metrics[metric],
            scores if is_paired else None,
            criterion,
            method="trained" if trial.truncate_from is None else "truncated",
            groups=trial.example_groups,
        )
        for trial, scores in measured
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
    trained = [
        comparison.build_candidate(adapter)
        for adapter in adapters.values()
        if adapter.method == "trained" and adapter.rank <= answer.rank and adapter is not present
    ]
    better = [
        candidate
        for candidate in trained
        if candidate.is_within_margin
        and (
            candidate.rank < answer.rank
            or comparison.compute_bounds(adapters[candidate.trial_id].cell, present.cell).high < 0
        )
    ]
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
    shown: list[ScoredAdapter] = []
    for adapter in sorted(adapters.values(), key=lambda adapter: (adapter.name not in named_ids, adapter.cell.loss)):
        is_best = (adapter.rank, adapter.method) not in {(better.rank, better.method) for better in shown}
        if adapter.name in named_ids or (is_best and parents[adapter.name] in (None, answer.trained_id)):
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
    scores = [test.get_weighted_scores(criterion.metric) for test in (chosen, reference)]
    ours, theirs = (
        ScoredAdapter.from_scores(
            test.trial_id,
            test.rank,
            test.value,
            test_scores if None not in scores else None,
            criterion,
            groups=test.example_groups,
        )
        for test, test_scores in zip((chosen, reference), scores, strict=True)
    )
    comparison = ReferenceComparison(theirs, {}, criterion)
    bounds = comparison.compute_bounds(ours.cell)
    high = comparison.unit.convert_difference(bounds.high) if ours.cell.examples else None
    return comparison.unit.convert_difference(bounds.mean), high


def _compare_with_reference(
    answer: AdapterAnswer, outcomes: Sequence[TrialOutcome], criterion: Criterion
) -> ReferenceComparison:
    """Return the comparison with the reference of an answer, at the answer's margin."""
    adapters = score_trials(outcomes, criterion)
    share, base = answer.margin_share, find_base(outcomes, criterion, answer.trained_id)
    margin: Margin = answer.margin if share is None else f"{100 * share:g}%"
    return ReferenceComparison(adapters[answer.reference_id], adapters, replace(criterion, margin=margin), base)


TRUNCATION_METHODS = {"kfac": "K-FAC", "svd": "SVD"}


def format_provenance(trial: TrialFinished, trained: TrialFinished) -> str:
    """Say how an adapter was made: "trained at rank 64 (learning rate 0.003, 240 steps), truncated to rank 8 by K-FAC".

    Args:
        trained: the training that the trial truncates, or the trial itself.
    """
    step = "" if trained.checkpoint_step is None else f"step {trained.checkpoint_step} of "
    mean = "the mean of the factors at " if trained.checkpoint_is_mean else ""
    details = (  # 0: unknown, as of a custom trainer
        f"learning rate {trained.learning_rate:g}" if trained.learning_rate else "",
        f"{mean}{step}{trained.steps} steps" if trained.steps else "",
    )
    settings = ", ".join(filter(None, details))
    text = f"trained at rank {trained.rank}" + (f" ({settings})" if settings else "")
    if trial.rank == trained.rank:
        return text
    return f"{text}, truncated to rank {trial.rank} by {TRUNCATION_METHODS[trial.truncation or 'svd']}"


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
    final_metric = criterion.metric
    if step < chosen.steps and "loss" in chosen.metrics:
        margin = criterion.margin if criterion.metric == "loss" else None
        criterion = replace(criterion, metric="loss", higher_is_better=False, margin=margin)
    compared = [outcome for outcome in at_step.values() if isinstance(outcome, TrialFinished)]
    has_means = criterion.metric == "loss" and step < chosen.steps and all(outcome.mean_losses for outcome in compared)
    scored = _score_trials([outcome.use_mean_losses() if has_means else outcome for outcome in compared], criterion)
    if chosen.trial_id not in scored:
        return None
    base = find_base(outcomes, criterion, trained.trial_id)
    comparison = ReferenceComparison(scored[chosen.trial_id], scored, criterion, base)
    final_values = {
        outcome.learning_rate: outcome.metrics.get(final_metric)
        for outcome in trainings
        if isinstance(outcome, TrialFinished) and outcome.is_direct and outcome.steps == chosen.steps
    }
    failures = {trial.learning_rate: trial.end_text for trial in trainings if not isinstance(trial, TrialFinished)}
    candidates = []
    for rate, outcome in sorted(at_step.items()):
        adapter, difference = scored.get(outcome.trial_id), {}
        if adapter is not None and adapter is not comparison.reference:
            fields = {"difference", "difference_low", "difference_high"}
            difference = comparison.build_candidate(adapter).model_dump(include=fields)
        candidates.append(
            LearningRateCandidate(
                learning_rate=rate,
                value=adapter and adapter.cell.value,
                final_value=final_values.get(rate),
                failure=failures.get(rate) or (None if adapter else "failed"),
                **difference,
            )
        )
    answer = LearningRateAnswer(
        learning_rate=trained.learning_rate,
        rank=trained.rank,
        metric=criterion.metric,
        step=step,
        steps=chosen.steps,
        margin=comparison.margin,
        candidates=candidates,
        sentence="",
    )
    return answer.model_copy(update={"sentence": _format_sentence(answer)})


def describe_run_learning_rate(records: Records) -> LearningRateAnswer | None:
    """Compare the learning rates of the training that the adapter comes from or, without an adapter, of the best one at the largest rank."""
    finished = [trial for trial in records.list_finished() if trial.arm.is_direct and trial.learning_rate > 0]
    trained_id = records.adapters[-1].answer.trained_id if records.adapters else None
    sign = -1 if records.started.higher_is_better else 1
    trained = min(finished, key=lambda t: (t.trial_id != trained_id, -t.rank, sign * t.value), default=None)
    return None if trained is None else describe_learning_rate(trained, records.outcomes, build_criterion(records))


def _format_sentence(answer: LearningRateAnswer) -> str:
    when = f"At step {answer.step} of {answer.steps}" if answer.step < answer.steps else "At the end"
    others = [candidate for candidate in answer.candidates if candidate.learning_rate != answer.learning_rate]
    results = ", ".join(_format_result(candidate) for candidate in others if candidate.difference is not None)
    tried_rates = [candidate.learning_rate for candidate in answer.candidates]
    is_at_edge = answer.learning_rate in (tried_rates[0], tried_rates[-1])
    sentences = (
        f"The learning rate is {answer.learning_rate:g}.",
        f"{when}, {answer.metric} of rank {answer.rank} was worse with the others by {results}." if results else "",
        *(f"{candidate.learning_rate:g} {candidate.failure}." for candidate in others if candidate.failure is not None),
        "It is the lowest or the highest one that was tried: --learning-rates tries others." if is_at_edge else "",
        "This is one seed, and another seed may favor another learning rate.",
    )
    return " ".join(filter(None, sentences))


def _format_result(candidate: LearningRateCandidate) -> str:
    low, high = candidate.difference_low, candidate.difference_high
    bounds = "" if low is None or high is None else f" ({INTERVAL:.0%} interval {low:+.2g} to {high:+.2g})"
    return f"{candidate.difference:+.2g} with {candidate.learning_rate:g}{bounds}"


def decide_run(
    records: Records,
    metric: str | None = None,
    margin: Margin | None = None,
    *,
    higher: bool | None = None,
    confidence: float = DEFAULT_CONFIDENCE,
    checkpoint: Checkpoint | None = None,
) -> Decision:
    """Decide by the run's metric, margin and checkpoint unless others are given.

    Raises:
        ResultsError: fewer than two ranks have the metric, or its direction is not known.
    """
    if margin is None and metric in (None, records.started.metric):
        margin = records.settings.margin
    table = build_run_table(records, metric, higher)
    checkpoint = checkpoint or records.settings.checkpoint
    return decide_table(table, margin, checkpoint=checkpoint, confidence=confidence)


def build_run_table(records: Records, metric: str | None = None, higher: bool | None = None) -> ScoreTable:
    """Build the table of a run's scores by `metric`, by default the deciding one.

    `higher` says whether higher is better, if given.

    Raises:
        ResultsError: neither the caller, nor the run, nor the metric's name has the direction.
    """
    started = records.started
    outcomes = list_comparable_outcomes(records)
    if started.data.form == "custom":  # The example scores of a custom trainer belong to the deciding metric.
        return build_table(outcomes, started.metric, started.higher_is_better if higher is None else higher)
    metric = metric or started.metric
    if higher is None:
        higher = started.get_metric_direction(metric)
    if higher is None:
        raise ResultsError(f"{format_unknown_direction(metric)}; give --higher-is-better or --lower-is-better")
    evaluation_metric = started.points_metric or started.metric
    return build_table(
        outcomes, metric, higher, evaluation_metric, partial_outcomes=records.outcomes, loss=started.data.loss_kind
    )


def list_comparable_outcomes(records: Records) -> list[TrialOutcome]:
    """List the outcomes that may be compared: complete trainings, and the base with their trained heads if there are any."""
    zero = [outcome for outcome in records.outcomes if outcome.rank == 0 and outcome.truncate_from is not None][-1:]
    direct = [outcome for outcome in records.outcomes if outcome.is_direct and (outcome.rank > 0 or not zero)]
    return exclude_longer_trainings([*zero, *direct])


def find_best_trial(records: Records, decision: Decision, rank: int) -> TrialFinished:
    """Find the trial with the best held-out value over seeds, at the rank's best learning rate."""
    evidence = next(evidence for evidence in decision.ranks if evidence.rank == rank)
    trials = [trial for trial in records.list_finished() if trial.trial_id in evidence.trial_ids]
    sign = -1 if decision.higher_is_better else 1
    return min(trials, key=lambda trial: (sign * trial.value, trial.seed))


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
    )


def compare_run_adapters(records: Records) -> list[AdapterCandidate]:
    """Compare every adapter of the run with the reference of its answer; empty before the first answer."""
    if not records.adapters:
        return []
    return compare_adapters(records.adapters[-1].answer, records.outcomes, build_criterion(records))
