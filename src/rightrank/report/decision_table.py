"""A decision in the terminal: the evidence by rank, the answer, the flags and the next run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from rightrank.records import Decision, RankEvidence
from rightrank.report.figures import ENOUGH
from rightrank.report.format import coverage, table_lines, visible
from rightrank.report.sentences import horizon_text
from rightrank.report.terminal_figures import terminal_curve

FLAGS = {
    "underpowered": "the data cannot show this",
    "rising": "the largest rank tried is the best by more than the margin",
    "lr_edge": "the best learning rate is the smallest or largest tried",
    "unstable": "some trainings ended without a result",
    "collapsed": "some trainings fell far below their own best: their learning rate is too high",
    "one_seed": "a rank that the answer rests on has one seed: the answer is an indication",
    "unequal_length": "trainings of unequal length are compared",
    "winner_gap": "the best of several learning rates is optimistic by more than half the margin",
    "metric_conflict": "another metric of the same trainings contradicts the answer for a rank",
    "may_be_capacity_limited": "the differences between ranks were still growing when training ended",
    "extrapolated": "the answer refers to a point outside the measured range",
}


def decision_text(
    decision: Decision, understood: list[str], colour: bool, width: int, commands: Sequence[str | None] = ()
) -> str:
    """The whole decision, ready to print; `commands` are those of its next runs."""
    parts = [visible(f"read:    {'; '.join(understood)}")] if understood else []
    trained = [(evidence.rank, evidence.value) for evidence in decision.ranks if evidence.rank > 0]
    curve = terminal_curve(trained, width, colour)
    evidence, answer = map(visible, evidence_lines(decision)), map(visible, answer_lines(decision, commands))
    return "\n".join([*parts, "", *([curve] if curve else []), *evidence, "", *answer])


def evidence_lines(decision: Decision) -> list[str]:
    """The table: one line a rank."""
    with_learning_rate = any(evidence.learning_rate for evidence in decision.ranks)
    heading = [
        "rank",
        decision.metric,
        coverage(decision, "interval"),
        "worse by",
        coverage(decision, "bounds"),
        "enough",
    ]
    heading += ["learning rate"] * with_learning_rate + ["seeds"]
    return table_lines([heading, *(_row(evidence, decision, with_learning_rate) for evidence in decision.ranks)])


def _row(evidence: RankEvidence, decision: Decision, with_learning_rate: bool) -> list[str]:
    reference = evidence.rank == decision.reference_rank
    row = [
        str(evidence.rank) if evidence.rank else "base",
        f"{evidence.value:.5g}",
        f"{evidence.low:.5g} to {evidence.high:.5g}" if evidence.low < evidence.high else "unknown",
        "best" if reference else _short(evidence.difference),
        "" if evidence.difference_low is None or reference else _bounds(evidence),
        _enough(evidence, decision),
    ]
    if with_learning_rate:
        row.append(f"{evidence.learning_rate:.2g}" if evidence.learning_rate else "")
    return [*row, str(evidence.seeds)]


def _enough(evidence: RankEvidence, decision: Decision) -> str:
    """`yes`, `no` or `inconclusive`; of one number a rank, which shows nothing, what the values suggest."""
    if decision.basis not in ("std", "values") or evidence.non_inferior is False:
        return ENOUGH[evidence.non_inferior]
    if evidence.rank == decision.reference_rank:
        return "best so far"
    return "perhaps" if (evidence.difference or 0.0) < decision.margin else "unlikely"


def _bounds(evidence: RankEvidence) -> str:
    return f"{_short(evidence.difference_low)} to {_short(evidence.difference_high)}"


def answer_lines(decision: Decision, commands: Sequence[str | None] = ()) -> list[str]:
    """Verdict, sentence, staircase, flags, next runs with their commands."""
    lines = [f"verdict: {decision.verdict.replace('_', ' ')}", f"answer:  {decision.sentence}"]
    safe = safe_choice(decision)
    lines += [f"         {safe}"] if safe else []
    stairs = [f"{step.rank} from {_short(step.margin)}" for step in decision.staircase]
    lines.append(f"margins: {', '.join(stairs)} (requested: {decision.margin:g})")
    lines += curve_lines(decision)
    if decision.horizon is not None:
        lines.append(f"horizon: {horizon_text(decision.horizon)}")
    lines.append(f"basis:   {decision.basis_note}")
    lines += [f"flag:    {flag}: {FLAGS.get(flag, '')}" for flag in decision.flags]
    lines += other_metric_lines(decision)
    return lines + next_lines(decision, commands, 9)


def safe_choice(decision: Decision) -> str | None:
    """What to take until an undecided answer is decided, and at which margin; None for every other answer."""
    if decision.verdict != "undecided":
        return None
    return (
        f"Until this is decided, rank {decision.fallback_rank} is the safe choice at the margin of {decision.margin:g}."
    )


def next_lines(decision: Decision, commands: Sequence[str | None], width: int) -> list[str]:
    """Each next run behind `next:`, below it its command, if there is one; `width` columns before the text."""
    lines = []
    for run, command in zip_longest(decision.next_runs, commands):
        lines.append(f"{'next:':<{width}}{run.sentence}")
        lines += [f"{'':<{width}}{command}"] if command is not None else []
    return lines


def other_metric_lines(decision: Decision) -> list[str]:
    """One line for each further metric."""
    return [
        f"metric:  {other.sentence}"
        if other.conflict
        else f"metric:  {other.metric}: {f'rank {other.rank}' if other.rank else other.verdict.replace('_', ' ')}, "
        f"at a margin of {_short(other.margin)}"
        for other in decision.other_metrics
    ]


def curve_lines(decision: Decision) -> list[str]:
    """The fitted curve in one line; empty without one."""
    curve = decision.curve
    if curve is None:
        return []
    top = max(evidence.rank for evidence in decision.ranks)
    law = "" if curve.form != "power" else f" {curve.a:.4g} {curve.b:+.3g}·r^-{curve.c:.2f};"
    from_rank = f" ({curve.r_margin_low:.0f} to {curve.r_margin_high:.0f})"
    gain = f" ({_short(curve.gain_to_come_low)} to {_short(curve.gain_to_come_high)})"
    if decision.basis == "values":  # without a measured noise the intervals have no width
        from_rank = gain = ""
    return [
        f"curve:   {curve.form.replace('_', '-')};{law} within the margin from rank {curve.r_margin:.0f}{from_rank}; "
        f"expected gain above rank {top}: {_short(curve.gain_to_come)}{gain}"
    ]


def _short(value: float | None) -> str:
    return (
        "" if value is None else "0" if abs(value) < 1e-12 else f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"
    )
