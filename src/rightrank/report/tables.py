"""A decision in the terminal: the evidence by rank, the answer, the flags and the next run."""

from __future__ import annotations

from collections.abc import Sequence

from rightrank.report.answer import answer_view, brief, certainty_rows, evidence_table, labelled
from rightrank.report.format import duration, size, table_lines, visible
from rightrank.report.terminal_figures import terminal_curve
from rightrank.schema.decision import Decision
from rightrank.schema.results import Preflight
from rightrank.search.protocol import SelectionCost

FINISH_SECONDS = 5  # the test split and the report of a small run; a longer one's are a small part of its time


def decision_text(decision: Decision, understood: list[str], width: int, commands: Sequence[str | None] = ()) -> str:
    """The whole decision, ready to print; `commands` are those of its next runs."""
    view = answer_view(decision, commands=commands)
    read = [visible(f"read:    {'; '.join(understood)}")] if understood else []
    trained = [(evidence.rank, evidence.value) for evidence in decision.ranks if evidence.rank > 0]
    curve = terminal_curve(trained, width)
    stairs = ", ".join(f"{step.rank} from {brief(step.margin)}" for step in decision.staircase)
    rows = [
        ("verdict", decision.verdict.replace("_", " ")),
        ("answer", view.training_rank),
        *view.safe_rows(),
        ("margins", f"{stairs} (requested: {decision.margin:g})"),
        *certainty_rows(decision),
        *(("metric", metric) for metric in view.metrics),
        *view.next_rows(),
    ]
    evidence = map(visible, table_lines(evidence_table(decision)))
    return "\n".join([*read, "", *([curve] if curve else []), *evidence, "", *map(visible, labelled(rows, 9))])


def preflight_text(found: Preflight) -> str:
    """Everything, for a person."""
    cost = found.cost
    parts = [f"about {cost.trainings:.3g} trainings of {cost.steps} steps, {cost.trainings_at_most:.3g} at most"]
    if cost.seconds is not None and cost.seconds_at_most is not None:
        parts.append(f"about {duration(cost.seconds)}, {duration(cost.seconds_at_most)} at most")
    lines = [*found.before, *_data_lines(found), *memory_lines(found), f"strategy {cost.strategy}: {'; '.join(parts)}"]
    lines += [*_whole_time(found), *found.notes]
    return "\n".join([*lines, "nothing was written: this was a dry run"])


def _whole_time(found: Preflight) -> list[str]:
    """The time from the command to its end: what is trained, and what stands around it."""
    seconds, most = found.cost.seconds, found.cost.seconds_at_most
    if seconds is None or most is None:
        return []
    around = found.preparation_seconds + FINISH_SECONDS
    return [
        f"time in all: about {duration(seconds + around)}, {duration(most + around)} at most: loading, planning and measuring took "
        f"{duration(found.preparation_seconds)} here, and the report takes some seconds"
    ]


def _data_lines(found: Preflight) -> list[str]:
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


def took_line(cost: SelectionCost, trainings: float, seconds: float) -> str:
    """The time of a selection, compared with the estimate for the trainings that ran and with that before the start."""
    assert cost.expected.seconds is not None
    assert cost.most.seconds is not None
    for_these = cost.expected.seconds * trainings / cost.expected.trainings
    return (
        f"took {duration(seconds)} for {trainings:.3g} trainings; the estimate for that many was {duration(for_these)} "
        f"({for_these / seconds - 1:+.0%}); the estimate before the start was {duration(cost.expected.seconds)} for "
        f"{cost.expected.trainings:.3g} trainings, at most {duration(cost.most.seconds)}"
    )
