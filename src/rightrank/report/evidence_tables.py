"""The evidence of both answers as rows of text, a heading first; what the second rests on; how trials ended, and what they cost."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rightrank.decision.comparison import is_within
from rightrank.decision.records import Records, trainings
from rightrank.decision.sentences import chance
from rightrank.report.answer import brief
from rightrank.report.format import duration, quantity, visible
from rightrank.schema.decision import AdapterAnswer, AdapterCandidate, Decision, RankEvidence
from rightrank.schema.trials import TrialCollapsed, TrialDiverged, TrialFailed, seconds_of

FLAGS = {
    "underpowered": "the data cannot show this",
    "rising": "the largest rank tried is the best by more than the margin",
    "lr_edge": "the best learning rate is the smallest or largest tried",
    "unstable": "some trainings ended without a result",
    "larger_rank_worse": "a larger rank is clearly worse than the best: its training may have failed",
    "collapsed": "some trainings fell far below their own best: their learning rate is too high",
    "one_seed": "a rank that the answer rests on has one seed: the answer is an indication",
    "unequal_length": "trainings of unequal length are compared",
    "winner_gap": "the best of several learning rates is optimistic by more than half the margin",
    "metric_conflict": "another metric of the same trainings contradicts the answer for a rank",
    "may_be_capacity_limited": "the differences between ranks were still growing when training ended",
    "checkpoint_matters": "at the other checkpoint of each training, the best or the last, the values pick another rank",
}
ENOUGH = {True: "yes", False: "no", None: "inconclusive"}  # by `RankEvidence.non_inferior`


def candidate_table(answer: AdapterAnswer, metric: str) -> list[list[str]]:
    """The candidates as text, a heading first: rank, how, value, difference from the reference, its bound, whether it holds."""
    heading = ["rank", "how", metric, "worse by", "95% bound", "holds"]
    return [heading, *(_candidate_row(candidate, answer) for candidate in answer.candidates)]


def _candidate_row(candidate: AdapterCandidate, answer: AdapterAnswer) -> list[str]:
    is_reference = candidate.trial_id == answer.reference_id
    bound = "–" if candidate.difference_high is None else f"{candidate.difference_high:+.4f}"
    return [
        str(candidate.rank),
        candidate.how,
        f"{candidate.value:.4f}",
        "reference" if is_reference else f"{candidate.difference:+.4f}",
        "" if is_reference else bound,
        ENOUGH[candidate.holds],
    ]


def evidence_table(decision: Decision) -> list[list[str]]:
    """The evidence, a row a rank and a heading first."""
    with_learning_rate = any(evidence.learning_rate for evidence in decision.ranks)
    interval, bounds = coverage(decision, "interval"), coverage(decision, "bounds")
    heading = ["rank", decision.metric, interval, "worse by", bounds, "enough"]
    heading += ["likely"] * _has_probabilities(decision)
    heading += ["learning rate"] * with_learning_rate + ["seeds"]
    return [heading, *(_evidence_row(evidence, decision, with_learning_rate) for evidence in decision.ranks)]


def _has_probabilities(decision: Decision) -> bool:
    return any(evidence.probability is not None for evidence in decision.ranks)


def _evidence_row(evidence: RankEvidence, decision: Decision, with_learning_rate: bool) -> list[str]:
    is_reference = evidence.rank == decision.reference_rank
    low, high = evidence.difference_low, evidence.difference_high
    row = [
        str(evidence.rank) if evidence.rank else "base",
        f"{evidence.value:.5g}",
        f"{evidence.low:.5g} to {evidence.high:.5g}" if evidence.low < evidence.high else "unknown",
        "best" if is_reference else brief(evidence.difference),
        "" if low is None or is_reference else f"{brief(low)} to {brief(high)}",
        _enough(evidence, decision),
        *["" if evidence.probability is None else chance(evidence.probability)] * _has_probabilities(decision),
    ]
    rate = f"{evidence.learning_rate:.2g}" if evidence.learning_rate else ""
    return [*row, *[rate] * with_learning_rate, str(evidence.seeds)]


def _enough(evidence: RankEvidence, decision: Decision) -> str:
    """`yes`, `no` or `inconclusive`; of one number a rank, which shows nothing, what the values suggest.

    A rank below one that failed, or beside a higher one that may be better, is inconclusive, whatever its own bound.
    """
    is_reading = decision.basis in ("std", "values")
    nothing_shown = decision.rank is None and decision.fallback_rank is None
    if evidence.rank == decision.reference_rank and (is_reading or nothing_shown):
        return "best so far"
    answer = decision.rank if decision.rank is not None else decision.fallback_rank
    if evidence.non_inferior and not is_reading and evidence.rank > 0 and (answer is None or evidence.rank < answer):
        return ENOUGH[None]
    if not is_reading or evidence.non_inferior is False:
        return ENOUGH[evidence.non_inferior]
    return "perhaps" if is_within(evidence.difference or 0.0, decision.margin) else "unlikely"


def certainty_rows(decision: Decision) -> list[tuple[str, str]]:
    """What the answer rests on, as labelled sentences: checkpoint, basis, optimism, flags."""
    optimism = (
        f"The best of several learning rates looks up to {decision.winner_gap:.2g} {metric_unit(decision.metric)} better than "
        "it is; the comparison corrects for that."
    )
    compared = ""
    if (note := decision.checkpoint) is not None:
        picks = f". By values alone, the last evaluations pick rank {note.last}, the best ones rank {note.best}."
        picks = "; by values alone, its last and its best pick the same rank." if note.last == note.best else picks
        compared = f"Each training counts at its {note.used} evaluation{picks}"
    rows = [
        ("checkpoint", compared),
        ("basis", decision.basis_note or ""),
        ("likely", decision.probability_note if "one_seed" in decision.flags or _has_probabilities(decision) else ""),
        ("optimism", optimism if decision.winner_gap else ""),
        *(("flag", f"{flag}: {FLAGS.get(flag, '')}") for flag in decision.flags),
    ]
    return [row for row in rows if row[1]]


def metric_unit(metric: str) -> str:
    """The unit of a metric's differences."""
    return "nats" if metric == "loss" else visible(metric)


def coverage(decision: Decision, noun: str) -> str:
    """`95% interval`; `interval over examples` for one seed; `interval` where the table shows no level."""
    if decision.confidence is not None:
        return f"{decision.confidence:.0%} {noun}"
    return f"{noun} over examples" if decision.basis.startswith("items") else noun


def table_lines(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> list[str]:
    """One line a row, cells padded to their column's width; columns in `left` are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def end_text(outcome: TrialCollapsed | TrialDiverged | TrialFailed) -> str:
    """How a trial without a result ended."""
    if isinstance(outcome, TrialCollapsed):
        return f"collapsed: {outcome.reason}"
    return (
        f"diverged at step {outcome.step}: {outcome.reason}" if isinstance(outcome, TrialDiverged) else outcome.reason
    )


def cost_sentence(records: Records) -> str:
    """The cost of all trials so far: trainings, truncations, trials without a result, and the time with the base's evaluation."""
    by_id = records.by_id
    finished = by_id.values()
    truncations = sum(trial.truncate_from is not None for trial in finished)
    lost = len(records.outcomes) - len(finished)
    parts = [quantity(trainings(records), "training")]
    parts += [quantity(truncations, "truncation")] if truncations else []
    parts += [f"{quantity(lost, 'trial')} without a result"] if lost else []
    seconds = sum(seconds_of(trial, by_id) for trial in finished)
    return ", ".join([*parts, *([duration(seconds)] if seconds else [])])
