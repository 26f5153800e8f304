"""The evidence for both answers as text: tables (heading row first), notes on certainty, how trials ended and what they cost."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rightrank.decision.comparison import is_within
from rightrank.decision.records import Records, count_trainings
from rightrank.decision.sentences import format_probability
from rightrank.report.answer import format_brief
from rightrank.report.format import format_duration, format_quantity, make_visible
from rightrank.schema.decision import AdapterAnswer, AdapterCandidate, Decision, RankEvidence
from rightrank.schema.trials import TrialCollapsed, TrialDiverged, TrialFailed, compute_added_seconds

FLAGS = {
    "underpowered": "there are too few held-out examples to resolve the margin",
    "rising": "the largest rank that was tried is better than all others by more than the margin",
    "lr_edge": "the best learning rate is the smallest or the largest that was tried",
    "unstable": "some trainings ended without a result",
    "larger_rank_worse": "a larger rank is clearly worse than the best one, so its training may have failed",
    "collapsed": "some trainings fell far below their own best value, so their learning rate is too high",
    "one_seed": "the answer depends on a rank with only one seed, so it is an indication",
    "unequal_length": "the compared trainings have different lengths",
    "selection_bias": "the best of several learning rates is optimistic by more than half the margin",
    "metric_conflict": "for some rank, another metric of the same trainings contradicts the answer",
    "may_be_capacity_limited": "the differences between ranks were still growing when training ended",
    "checkpoint_matters": "the best and the last checkpoint of each training lead to different ranks",
}
ENOUGH = {True: "yes", False: "no", None: "inconclusive"}  # by `RankEvidence.non_inferior`


def build_candidate_table(answer: AdapterAnswer, metric: str) -> list[list[str]]:
    """Return the candidate adapters as rows of text, heading first."""
    heading = ["rank", "method", metric, "worse by", "95% bound", "enough"]
    return [heading, *(_build_candidate_row(candidate, answer) for candidate in answer.candidates)]


def _build_candidate_row(candidate: AdapterCandidate, answer: AdapterAnswer) -> list[str]:
    is_reference = candidate.trial_id == answer.reference_id
    bound = "–" if candidate.difference_high is None else f"{candidate.difference_high:+.4f}"
    return [
        str(candidate.rank),
        candidate.method,
        f"{candidate.value:.4f}",
        "reference" if is_reference else f"{candidate.difference:+.4f}",
        "" if is_reference else bound,
        ENOUGH[candidate.is_within_margin],
    ]


def build_evidence_table(decision: Decision) -> list[list[str]]:
    """Return the evidence as rows of text, heading first, then one row for each rank."""
    with_learning_rate = any(evidence.learning_rate for evidence in decision.ranks)
    interval, bounds = format_interval_label(decision, "interval"), format_interval_label(decision, "bounds")
    heading = ["rank", decision.metric, interval, "worse by", bounds, "enough"]
    heading += ["likely"] * _has_probabilities(decision)
    heading += ["learning rate"] * with_learning_rate + ["seeds"]
    return [heading, *(_build_evidence_row(evidence, decision, with_learning_rate) for evidence in decision.ranks)]


def _has_probabilities(decision: Decision) -> bool:
    return any(evidence.probability is not None for evidence in decision.ranks)


def _build_evidence_row(evidence: RankEvidence, decision: Decision, with_learning_rate: bool) -> list[str]:
    is_reference = evidence.rank == decision.reference_rank
    low, high = evidence.difference_low, evidence.difference_high
    row = [
        str(evidence.rank) if evidence.rank else "base",
        f"{evidence.value:.5g}",
        f"{evidence.low:.5g} to {evidence.high:.5g}" if evidence.low < evidence.high else "unknown",
        "best" if is_reference else format_brief(evidence.difference),
        "" if low is None or is_reference else f"{format_brief(low)} to {format_brief(high)}",
        _format_enough(evidence, decision),
        *["" if evidence.probability is None else format_probability(evidence.probability)]
        * _has_probabilities(decision),
    ]
    rate = f"{evidence.learning_rate:.2g}" if evidence.learning_rate else ""
    return [*row, *[rate] * with_learning_rate, str(evidence.seeds)]


def _format_enough(evidence: RankEvidence, decision: Decision) -> str:
    """Return whether a rank is enough, as one word.

    Without an uncertainty (one number for each rank) nothing is proven, so the words are weaker: "perhaps" and "unlikely". A rank below one that
    failed, or next to a higher one that may be better, is inconclusive, whatever its own bound says.
    """
    is_reading = decision.basis in ("std", "values")
    has_no_rank = decision.rank is None and decision.fallback_rank is None
    if evidence.rank == decision.reference_rank and (is_reading or has_no_rank):
        return "best so far"
    answer = decision.rank if decision.rank is not None else decision.fallback_rank
    if evidence.non_inferior and not is_reading and evidence.rank > 0 and (answer is None or evidence.rank < answer):
        return ENOUGH[None]
    if not is_reading or evidence.non_inferior is False:
        return ENOUGH[evidence.non_inferior]
    return "perhaps" if is_within(evidence.difference or 0.0, decision.margin) else "unlikely"


def build_margin_steps(decision: Decision) -> list[tuple[float, int]]:
    """Return `(margin, rank)` pairs: from each margin on, this rank is enough. The first margin is 0."""
    steps = [(step.margin, step.rank) for step in decision.staircase]
    return steps if steps and steps[0][0] == 0 else [(0.0, decision.reference_rank), *steps]


def build_certainty_rows(decision: Decision) -> list[tuple[str, str]]:
    """Return `(label, sentence)` rows that explain how certain the answer is: checkpoint, basis, optimism and flags."""
    optimism = (
        f"The best of several learning rates appears up to {decision.selection_bias:.2g} {get_metric_unit(decision.metric)} better than "
        "it is; the comparison corrects for this bias."
    )
    compared = ""
    if (note := decision.checkpoint) is not None:
        picks = f"By values alone, the last evaluations select rank {note.last} and the best ones rank {note.best}."
        picks = (
            "By values alone, the last and the best evaluations select the same rank."
            if note.last == note.best
            else picks
        )
        compared = f"Each training is compared at its {note.checkpoint} evaluation. {picks}"
    rows = [
        ("checkpoint", compared),
        ("basis", decision.basis_note or ""),
        ("likely", decision.probability_note if "one_seed" in decision.flags or _has_probabilities(decision) else ""),
        ("optimism", optimism if decision.selection_bias else ""),
        *(("flag", f"{flag}: {FLAGS.get(flag, '')}") for flag in decision.flags),
    ]
    return [row for row in rows if row[1]]


def get_metric_unit(metric: str) -> str:
    """Return the unit in which differences of the metric are reported."""
    return "nats" if metric == "loss" else make_visible(metric)


def format_interval_label(decision: Decision, noun: str) -> str:
    """Return `95% interval`, `interval over examples` for one seed, or `interval` if the table states no confidence level."""
    if decision.confidence is not None:
        return f"{decision.confidence:.0%} {noun}"
    return f"{noun} over examples" if decision.basis.startswith("examples") else noun


def format_table(rows: Sequence[Sequence[str]], left_columns: Collection[int] = ()) -> list[str]:
    """Format rows as lines with aligned columns. Columns in `left_columns` are aligned to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def format_trial_end(outcome: TrialCollapsed | TrialDiverged | TrialFailed) -> str:
    """Describe why a trial ended without a result."""
    if isinstance(outcome, TrialCollapsed):
        return f"collapsed: {outcome.reason}"
    return (
        f"diverged at step {outcome.step}: {outcome.reason}" if isinstance(outcome, TrialDiverged) else outcome.reason
    )


def format_cost(records: Records) -> str:
    """Describe the cost of all trials so far: trainings, truncations, trials without a result, and the total time."""
    by_id = records.by_id
    finished = by_id.values()
    truncations = sum(trial.truncate_from is not None for trial in finished)
    num_without_result = len(records.outcomes) - len(finished)
    texts = [format_quantity(count_trainings(records), "training")]
    texts += [format_quantity(truncations, "truncation")] if truncations else []
    texts += [f"{format_quantity(num_without_result, 'trial')} without a result"] if num_without_result else []
    seconds = sum(compute_added_seconds(trial, by_id) for trial in finished)
    return ", ".join([*texts, *([format_duration(seconds)] if seconds else [])])
