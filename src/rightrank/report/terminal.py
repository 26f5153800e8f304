"""Format terminal output: a decision with its evidence and curve, a preflight, and the lines before a selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rightrank.report.answer import (
    FLAGS,
    Answers,
    build_answer_view,
    build_evidence_table,
    explain_probabilities,
    format_brief,
    format_labelled_rows,
    format_table,
)
from rightrank.report.format import format_bytes, format_duration, format_metric_label, format_quantity, make_visible
from rightrank.report.terminal_curve import draw_terminal_curve
from rightrank.schema.decision import Decision
from rightrank.schema.events import DataSummary, RunStarted

if TYPE_CHECKING:
    from rightrank.schema.results import Preflight, PreflightCost


def format_decision(decision: Decision, table_notes: list[str], width: int, commands: Sequence[str | None] = ()) -> str:
    """Format the complete decision.

    Args:
        commands: the commands of the decision's next runs, in the same order.
    """
    view = build_answer_view(Answers(decision), commands)
    table_line = [make_visible(f"read:       {'; '.join(table_notes)}")] if table_notes else []
    trained = [(evidence.rank, evidence.value) for evidence in decision.ranks if evidence.rank > 0]
    curve = draw_terminal_curve(trained, width, label=format_metric_label(decision.metric, decision.higher_is_better))
    stairs = ", ".join(f"{step.rank} from {format_brief(step.margin)}" for step in decision.staircase)
    rows = [
        (decision.verdict.replace("_", " "), view.training_rank),
        ("margins", f"{stairs} (requested: {decision.margin:g})"),
        ("basis", decision.basis_note),
        ("likely", explain_probabilities(decision)),
        *(("flag", f"{flag}: {FLAGS.get(flag, '')}") for flag in decision.flags),
        *view.build_next_rows(),
    ]
    evidence = map(make_visible, format_table(build_evidence_table(decision)))
    return "\n".join([*table_line, "", *curve, *evidence, "", *map(make_visible, format_labelled_rows(rows, 12))])


def format_preflight(preflight: Preflight) -> str:
    """Format the complete preflight."""
    splits = ", ".join(f"{split.examples:,} {name}" for name, split in preflight.splits.items())
    split_source = "given splits" if preflight.splits_given else "split by content"
    data = [
        f"data ({preflight.form}, {split_source}): {splits} examples",
        *(f"  {line}" for line in preflight.left_out),
    ]
    labels = ", ".join(f"{split.label_tokens:,} {name}" for name, split in preflight.splits.items())
    longest = f"longest example: {preflight.longest} tokens of at most {preflight.seq_len}"
    work = [f"label tokens: {labels}; {longest}", format_memory(preflight), _format_strategy(preflight.cost)]
    return "\n".join([*data, *work, *preflight.notes, "nothing was written: this was a dry run"])


def format_cost(preflight: Preflight, time_text: str) -> str:
    """Format trainings, time and the largest memory in a line, which a selection prints before it starts."""
    needed_bytes = [
        row.needed_bytes for row in preflight.ranks if row.needed_bytes is not None and row.fits is not False
    ]
    memory = f"{format_bytes(max(needed_bytes))} of memory" if needed_bytes else ""
    return f"cost: {'; '.join(filter(None, [_format_trainings(preflight.cost), time_text, memory]))}"


def _format_trainings(cost: PreflightCost) -> str:
    """Describe the expected and the largest number of trainings."""
    if cost.trainings == cost.trainings_at_most:
        return f"{format_quantity(round(cost.trainings, 2), 'training')} of {cost.steps} steps"
    return f"about {cost.trainings:.3g} trainings of {cost.steps} steps, {cost.trainings_at_most:.3g} at most"


def _format_strategy(cost: PreflightCost) -> str:
    """Describe the strategy, with its number of trainings."""
    to_adapter = cost.trainings_to_adapter
    first = f"; the adapter after about {to_adapter:.3g}" if to_adapter < cost.trainings else ""
    counted = (
        "" if cost.trainings == cost.trainings_at_most else " (a training that is stopped early counts as a fraction)"
    )
    return f"strategy {cost.strategy}: {_format_trainings(cost)}{counted}{first}"


def format_memory(preflight: Preflight) -> str:
    """List the ranks with their memory, and the budget."""
    planned_rows = [(row, row.needed_bytes) for row in preflight.ranks if row.needed_bytes is not None]
    if not planned_rows:
        return (
            f"ranks: {', '.join(str(row.rank) for row in preflight.ranks)} (memory not planned for this architecture)"
        )
    rank_texts = ", ".join(
        f"{row.rank} ({format_bytes(needed_bytes)}{'' if row.fits is not False else ', does not fit'})"
        for row, needed_bytes in planned_rows
    )
    budget = (
        "no budget given" if preflight.memory_bytes is None else f"{format_bytes(preflight.memory_bytes)} available"
    )
    return f"ranks and memory: {rank_texts}; {budget}"


def format_time_estimate(expected_seconds: float, max_seconds: float, budget_hours: float | None) -> str:
    """Describe the expected and the largest time of the selection, limited by its time budget."""
    if budget_hours is None or max_seconds <= budget_hours * 3600:
        return f"about {format_duration(expected_seconds)}, at most {format_duration(max_seconds)}"
    budget_seconds = budget_hours * 3600
    text = f"about {format_duration(min(expected_seconds, budget_seconds))}, at most {format_duration(budget_seconds)}"
    return (
        text
        if expected_seconds <= budget_seconds
        else f"{text}, without the time budget about {format_duration(expected_seconds)}"
    )


def format_plan(started: RunStarted, steps: int) -> str:
    if started.data.form == "custom":
        better = "higher" if started.higher_is_better else "lower"
        length = f"trainings of {steps} steps" if steps else "the trainer sets the length of a training"
        return f"trainer {started.trainer}, by {started.metric} ({better} is better); {length}"
    splits = started.data.splits
    counts = ", ".join(f"{summary.examples} {name}" for name, summary in splits.items())
    notes = describe_data_issues(started.data)
    read = f"{started.data.rows:,} rows; " if started.data.rows else ""
    form = started.data.form + (f" (from {started.data.shape})" if started.data.shape else "")
    return (
        f"{read}examples: {counts}{' (' + '; '.join(notes) + ')' if notes else ''}; form: {form}; "
        f"trainings of {steps} steps on {started.environment['device']}"
    )


def describe_data_issues(data: DataSummary) -> list[str]:
    """Describe, with their counts, the rows that were left out, cut or look doubtful."""
    splits = data.splits.values()
    counts = (
        (data.repeated, "duplicate held-out rows left out"),
        (data.not_evaluated, "held-out rows not evaluated, beyond --max-eval-examples"),
        (sum(summary.truncated for summary in splits), "cut to the maximum length"),
        (sum(summary.dropped for summary in splits), "dropped because no label token is left"),
        (data.empty_prompts, "with an empty prompt"),
        (data.equal_pairs, "pairs left out because `chosen` and `rejected` are the same"),
        (
            sum(summary.equal for summary in splits),
            "pairs left out because both answers are the same within the maximum length",
        ),
        (data.unreadable, "rows skipped because of lone surrogates, which no tokenizer accepts"),
        (
            data.groups,
            f"groups of validation examples (rows with one `{data.grouped_by}`), which the bounds treat as units",
        ),
        (data.groups_across_splits, f"held-out groups (`{data.grouped_by}`) that also have rows in the training split"),
        (
            data.duplicates_across_splits,
            "held-out examples are also in another split (exact duplicates across splits), which favours high ranks",
        ),
        (
            data.near_duplicates_across_splits,
            "held-out examples differ from a training example only in white space or case, which favours high ranks",
        ),
    )
    unused_columns = [f"columns not used: {', '.join(data.unused_columns)}"] if data.unused_columns else []
    return [*(f"{count:,} {description}" for count, description in counts if count), *unused_columns]
