"""A decision in the terminal: the evidence by rank, the answer, the flags and the next run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from rightrank.decision.comparison import is_within
from rightrank.report.figure import HeatMap, best_column
from rightrank.report.figures import ENOUGH
from rightrank.report.format import coverage, duration, metric_unit, or_dash, quantity, size, table_lines, visible
from rightrank.report.sentences import horizon_text
from rightrank.report.terminal_figures import terminal_curve
from rightrank.schema.decision import Decision, RankEvidence, SweepRow
from rightrank.schema.results import Preflight, PreflightStrategy

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
    return "perhaps" if is_within(evidence.difference or 0.0, decision.margin) else "unlikely"


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


SHARED = "shared by all ranks"


def sweep_text(rows: Sequence[SweepRow]) -> str:
    """One line per setting and rank."""
    heading = ["setting", "rank", "learning rate", "held-out", "gain", "parameters", "shared"]
    cells = [
        [
            row.setting,
            str(row.rank),
            f"{row.learning_rate:g}",
            f"{row.value:.4f}",
            f"{row.gain:+.4f}",
            or_dash(row.parameters, ","),
            or_dash(row.shared_parameters, ","),
        ]
        for row in rows
    ]
    return "\n".join(table_lines([heading, *cells], left=(0,)))


def sweep_map(rows: Sequence[SweepRow], metric: str, higher_is_better: bool) -> HeatMap | None:
    """Rank × setting, each at its best learning rate; it shows whether the best setting depends on the rank.

    None without a sweep.
    """
    if not rows:
        return None
    sign = 1 if higher_is_better else -1
    ranks = sorted({row.rank for row in rows})
    settings = list(dict.fromkeys(row.setting for row in rows))
    found = {(row.rank, row.setting): row for row in rows}
    shared = {row.rank: row.value - sign * row.gain for row in rows}
    values = tuple(
        (shared[rank], *(found[rank, name].value if (rank, name) in found else None for name in settings))
        for rank in ranks
    )
    notes = tuple(
        (
            "",
            *(
                f"learning rate {found[rank, name].learning_rate:g}" if (rank, name) in found else ""
                for name in settings
            ),
        )
        for rank in ranks
    )
    best = tuple(best_column(row, not higher_is_better) for row in values)
    columns = (SHARED, *settings)
    best_text = ", ".join(
        f"rank {rank} {columns[place]}" for rank, place in zip(ranks, best, strict=True) if place is not None
    )
    return HeatMap(
        name="sweep",
        title="Other settings, each at its best learning rate",
        alt=f"Held-out {metric} of the relevant ranks under further settings. Best: {best_text}.",
        row_label="rank",
        column_label="setting",
        row_names=tuple(str(rank) for rank in ranks),
        column_names=columns,
        values=values,
        notes=notes,
        best=best,
        lower_is_better=not higher_is_better,
    )


def preflight_text(found: Preflight) -> str:
    """Everything, for a person."""
    lines = [*data_lines(found), *memory_lines(found), *cost_lines(found), *precision_lines(found), *found.notes]
    return "\n".join([*lines, "nothing was written: this was a dry run"])


def data_lines(found: Preflight) -> list[str]:
    """Splits and what was left out; what a selection prints of them beside its plan is `labels_line`."""
    splits = ", ".join(f"{split.items:,} {name}" for name, split in found.splits.items())
    given = "given splits" if found.splits_given else "split by content"
    return [
        f"data ({found.form}, {given}): {splits} examples",
        *(f"  {line}" for line in found.left_out),
        labels_line(found),
    ]


def labels_line(found: Preflight) -> str:
    """Label tokens by split, and the longest example."""
    labels = ", ".join(f"{split.label_tokens:,} {name}" for name, split in found.splits.items())
    return f"label tokens: {labels}; longest example: {found.longest} tokens of at most {found.seq_len}"


def memory_lines(found: Preflight) -> list[str]:
    """Ranks with their memory, and the budget."""
    known = [(one, one.needed_bytes) for one in found.ranks if one.needed_bytes is not None]
    if not known:
        return [f"ranks: {', '.join(str(one.rank) for one in found.ranks)} (memory not planned for this architecture)"]
    shown = ", ".join(
        f"{one.rank} ({size(needed)}{'' if one.fits is not False else ', does not fit'})" for one, needed in known
    )
    budget = "no budget given" if found.memory_bytes is None else f"{size(found.memory_bytes)} available"
    return [f"ranks and memory: {shown}; {budget}"]


def cost_lines(found: Preflight) -> list[str]:
    """Trainings, time and price of every strategy, that of the settings first."""
    rows = sorted(found.cost.strategies, key=lambda row: row.strategy != found.cost.strategy)
    return [
        f"strategy {row.strategy}{'' if index else ' (this run)'}: {_cost(row, found.cost.steps)}"
        for index, row in enumerate(rows)
    ]


def _cost(row: PreflightStrategy, steps: int) -> str:
    parts = [f"about {row.trainings:.3g} trainings of {steps} steps, {row.trainings_at_most:.3g} at most"]
    if row.seconds is not None and row.seconds_at_most is not None:
        parts.append(f"about {duration(row.seconds)}, {duration(row.seconds_at_most)} at most")
    if row.price is not None:
        parts.append(f"{row.price:.2f} at the price given")
    return "; ".join(parts)


def precision_lines(found: Preflight) -> list[str]:
    """What can be settled, and what would cure it where the margin is too narrow."""
    if found.expected_half_width is None:
        return []
    examples = found.splits["validation"].items
    lines = [
        f"expected precision: ±{found.expected_half_width:.2g} {metric_unit(found.metric)} (one-sided 95%) on "
        f"{quantity(examples, 'validation example')} and {quantity(found.seeds, 'seed')}, for the rank that differs most "
        "from the top; from the base's losses and the noise of stored runs"
    ]
    if found.cures:
        lines.append(
            f"at the margin of {found.margin:g} the answer is likely to be undecided; what would settle it: "
            + ", or ".join(found.cures)
        )
    return lines
