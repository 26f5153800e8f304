"""What the terminal shows: a decision with its evidence and its curve, a preflight, the lines of a selection before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor, log2, log10
from textwrap import wrap
from typing import TYPE_CHECKING, TypeAlias

from rightrank.decision.records import Answers
from rightrank.report.answer import answer_view, brief, labelled
from rightrank.report.evidence_tables import certainty_rows, evidence_table, table_lines
from rightrank.report.figure import metric_label
from rightrank.report.format import duration, size, visible
from rightrank.schema.decision import Decision
from rightrank.schema.events import DataSummary, RunStarted
from rightrank.schema.trials import split_name

if TYPE_CHECKING:
    from rightrank.schema.results import Preflight, PreflightCost


def decision_text(decision: Decision, understood: list[str], width: int, commands: Sequence[str | None] = ()) -> str:
    """The whole decision, ready to print; `commands` are those of its next runs."""
    view = answer_view(Answers(decision), commands)
    read = [visible(f"read:    {'; '.join(understood)}")] if understood else []
    trained = [(evidence.rank, evidence.value) for evidence in decision.ranks if evidence.rank > 0]
    curve = terminal_curve(trained, width, label=metric_label(decision.metric, decision.higher_is_better))
    stairs = ", ".join(f"{step.rank} from {brief(step.margin)}" for step in decision.staircase)
    rows = [
        ("verdict", decision.verdict.replace("_", " ")),
        ("answer", view.training_rank),
        ("", view.safe_choice),
        ("margins", f"{stairs} (requested: {decision.margin:g})"),
        *certainty_rows(decision),
        *(("metric", metric) for metric in view.metrics),
        *view.next_rows(),
    ]
    evidence = map(visible, table_lines(evidence_table(decision)))
    return "\n".join([*read, "", *([curve] if curve else []), *evidence, "", *map(visible, labelled(rows, 9))])


def preflight_text(asked: Preflight) -> str:
    """Everything, for a person."""
    splits = ", ".join(f"{split.items:,} {name}" for name, split in asked.splits.items())
    given = "given splits" if asked.splits_given else "split by content"
    data = [f"data ({asked.form}, {given}): {splits} examples", *(f"  {line}" for line in asked.left_out)]
    return "\n".join([*data, *preflight_lines(asked), *asked.notes, "nothing was written: this was a dry run"])


def preflight_lines(asked: Preflight) -> list[str]:
    """Label tokens, memory and trainings, which a selection prints beside its plan."""
    labels = ", ".join(f"{split.label_tokens:,} {name}" for name, split in asked.splits.items())
    longest = f"longest example: {asked.longest} tokens of at most {asked.seq_len}"
    return [f"label tokens: {labels}; {longest}", _memory_line(asked), _cost_line(asked.cost)]


def _cost_line(cost: PreflightCost) -> str:
    """The trainings of a selection."""
    if cost.trainings == cost.trainings_at_most:
        return f"strategy {cost.strategy}: {cost.trainings:.3g} trainings of {cost.steps} steps"
    to_adapter = cost.trainings_to_adapter
    first = f"; the adapter after about {to_adapter:.3g}" if to_adapter < cost.trainings else ""
    return (
        f"strategy {cost.strategy}: about {cost.trainings:.3g} trainings of {cost.steps} steps, {cost.trainings_at_most:.3g} at most "
        f"(one stopped early counts for its part){first}"
    )


def _memory_line(asked: Preflight) -> str:
    """Ranks with their memory, and the budget."""
    known = [(row, row.needed_bytes) for row in asked.ranks if row.needed_bytes is not None]
    if not known:
        return f"ranks: {', '.join(str(row.rank) for row in asked.ranks)} (memory not planned for this architecture)"
    shown = ", ".join(
        f"{row.rank} ({size(needed)}{'' if row.fits is not False else ', does not fit'})" for row, needed in known
    )
    budget = "no budget given" if asked.memory_bytes is None else f"{size(asked.memory_bytes)} available"
    return f"ranks and memory: {shown}; {budget}"


def time_line(expected: float, most: float, measured: str, budget_hours: float | None) -> str:
    """The expected and the largest time of the selection in seconds, within its budget."""
    basis = f"measured before the start: {measured}, then discarded"
    if budget_hours is not None and most > budget_hours * 3600:
        allowed = budget_hours * 3600
        without = "" if expected <= allowed else f"; without the budget of time about {duration(expected)}"
        return f"time: about {duration(min(expected, allowed))}, at most {duration(allowed)}{without} ({basis})"
    return f"time: about {duration(expected)}, at most {duration(most)} ({basis})"


def plan_line(started: RunStarted, steps: int) -> str:
    if started.data.form == "own":
        better = "higher" if started.higher_is_better else "lower"
        length = f"trainings of {steps} steps" if steps else "trainings of the trainer's own length"
        return f"trainer {started.trainer}, by {started.metric} ({better} is better); {length}"
    splits = started.data.splits
    counts = ", ".join(f"{summary.items} {split_name(name)}" for name, summary in splits.items())
    notes = left_out(started.data)
    read = f"{started.data.rows:,} rows; " if started.data.rows else ""
    form = started.data.form + (f" (from {started.data.shape})" if started.data.shape else "")
    return (
        f"{read}examples: {counts}{' (' + '; '.join(notes) + ')' if notes else ''}; form: {form}; "
        f"trainings of {steps} steps on {started.environment['device']}"
    )


def left_out(data: DataSummary) -> list[str]:
    """What was left out, truncated or found doubtful while reading, with its number."""
    splits = data.splits.values()
    counts = (
        (data.repeated, "equal held-out rows left out"),
        (data.not_evaluated, "held-out rows not evaluated, beyond --eval-items"),
        (sum(summary.truncated for summary in splits), "truncated to the maximum length"),
        (sum(summary.dropped for summary in splits), "dropped, no label token left"),
        (data.equal_pairs, "pairs left out: `chosen` and `rejected` are the same"),
        (sum(summary.equal for summary in splits), "pairs left out: the same within the maximum length"),
        (data.unreadable, "rows skipped: lone surrogates, which no tokenizer accepts"),
        (data.groups, f"groups of validation examples (rows with one `{data.grouped_by}`), over which the bounds are"),
        (data.groups_across_splits, f"held-out groups (`{data.grouped_by}`) of which train has rows too"),
        (
            data.duplicates_across_splits,
            "held-out examples are in another split too (exact duplicates across splits), which favours high ranks",
        ),
        (
            data.near_duplicates_across_splits,
            "held-out examples differ from a training example in white space or case alone, which favours high ranks",
        ),
    )
    return [f"{count:,} {what}" for count, what in counts if count]


MAX_CURVE_WIDTH, CURVE_ROWS = 72, 10  # characters
Points: TypeAlias = Sequence[tuple[int, float]]  # rank and value, by ascending rank


def terminal_curve(points: Points, width: int, truncated: Points = (), *, label: str) -> str:
    """Draw values against the logarithm of the rank as text, at most `width` characters wide; empty below two ranks.

    Args:
        points: trained adapters (●).
        truncated: adapters truncated from a higher rank (○; ◉ where both fall on one place).
        label: the name of the values, with the better direction.
    """
    ranks = sorted({rank for rank, _ in (*points, *truncated)})
    if len(ranks) < 2:
        return ""
    values = [value for _, value in (*points, *truncated)]
    low, span = min(values), (max(values) - min(values)) or abs(values[0]) or 1.0
    at = {row: low + span * (1 - row / (CURVE_ROWS - 1)) for row in range(0, CURVE_ROWS, 3)}
    # Two digits of the step between ticks, so that no two have the same text; with zeros, so that they line up.
    digits = max(4, 2 + floor(log10(max(map(abs, at.values())))) - floor(log10(span / (len(at) - 1))))
    ticks = {row: f"{value:#.{digits}g}".rstrip(".") for row, value in at.items()}
    margin = max(map(len, ticks.values()))
    columns = max(len(ranks), min(width, MAX_CURVE_WIDTH) - margin - 1 - len(str(ranks[-1])))
    column = {rank: round((columns - 1) * log2(rank / ranks[0]) / log2(ranks[-1] / ranks[0])) for rank in ranks}
    hollow, full = (
        {(round((CURVE_ROWS - 1) * (1 - (value - low) / span)), column[rank]) for rank, value in adapters}
        for adapters in (truncated, points)
    )
    cells = dict.fromkeys(hollow, "○") | dict.fromkeys(full, "●") | dict.fromkeys(hollow & full, "◉")
    lines = [
        f"{ticks.get(row, ''):>{margin}}{'┤' if row in ticks else '│'}"
        + "".join(cells.get((row, x), " ") for x in range(columns))
        + "│"
        for row in range(CURVE_ROWS)
    ]
    frame = f"{'':{margin}}┌{'─' * columns}┐", f"{'':{margin}}└{'─' * columns}┘"
    both = ", ◉ both" if hollow & full else ""
    legend = f" (● trained, ○ truncated{both})" if truncated and columns > 33 + len(both) else ""
    names = " " * (margin + 1) + _rank_names({column[rank]: str(rank) for rank in ranks})
    return "\n".join(
        [
            *wrap(label, width),
            frame[0],
            *lines,
            frame[1],
            names,
            f"{'':{margin + 1}}{'LoRA rank' + legend:^{columns}}".rstrip(),
        ]
    )


def _rank_names(names: Mapping[int, str]) -> str:
    """The names from their columns on; one that would touch the name before it is left out."""
    line = ""
    for column, name in names.items():
        if not line or column > len(line):
            line = line.ljust(column) + name
    return line
