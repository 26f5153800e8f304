"""Both answers of a run in words: one view that the terminal, the status, the notebook, the report and the model card print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest

from rightrank.decision.records import Answers
from rightrank.decision.sentences import format_number
from rightrank.report.format import format_quantity, make_visible
from rightrank.schema.decision import Decision, ExportedAdapter, MetricAnswer
from rightrank.schema.events import RunKind, RunStarted

# From benchmarks/learning_rate/table_new.json; `tests/benchmarks/test_learning_rate.py` compares the numbers.
LONGER_ADVICE = (
    "The next trainings are best spent on more steps: on eight locked grids, twice the steps lowered the loss by 0.024 nats, and a "
    "second seed or rank by at most 0.002. --goal best-adapter continues this run with twice the steps and keeps the better adapter."
)


@dataclass(frozen=True, slots=True)
class AnswerView:
    """Both answers in words. A field is empty if its answer is not available yet or was not requested."""

    adapter_headline: str  # the deployment rank in a few words
    rank_headline: str  # the training rank in a few words
    adapter: str  # the deployment rank in a sentence
    # How the adapter was made, at which rank it loads, whether a larger one may be better, and its test-split result.
    adapter_notes: tuple[str, ...]
    learning_rate: str  # the choice of the adapter's learning rate; empty if only one was tried
    training_rank: str  # the training rank in a sentence; until it is available, what is missing
    estimate: str  # an estimate of the training rank if it was not requested
    verdict: str  # with the flags in brackets
    safe_choice: str  # a rank that is enough, while the answer is undecided
    metrics: tuple[str, ...]  # the results by other metrics
    next_runs: tuple[tuple[str, str | None], ...]  # each with a command that can be pasted, if there is one

    @property
    def headline(self) -> str:
        """Summarise both answers in a few words."""
        return " · ".join(filter(None, (self.adapter_headline, self.rank_headline))) or "Running: no answer yet"

    def build_next_rows(self) -> list[tuple[str, str]]:
        """Return a row for each suggested next run, followed by a row with its command."""
        return [row for run, command in self.next_runs for row in (("next", run), ("", command or ""))]


def build_answer_view(answers: Answers, commands: Sequence[str | None] = ()) -> AnswerView:
    """Describe the answers in words.

    Args:
        commands: the commands of the next runs, in the same order; None for a run without a command.
    """
    decision, adapter, asks_for_rank = answers.decision, answers.adapter, answers.goal == "training-rank"
    rank = "not available yet" if decision is None else decision.rank or decision.verdict.replace("_", " ")
    rank_text = f"not requested (--goal {answers.goal})."
    if decision is None and asks_for_rank:
        so_far = format_quantity(answers.trainings, "training")
        rank_text = f"{so_far} so far. A comparison needs two ranks with a result."
    return AnswerView(
        adapter_headline=f"Adapter: rank {adapter.handed_over.rank_text}" if adapter else "",
        rank_headline="" if not asks_for_rank or not (adapter or decision) else f"Training rank: {rank}",
        adapter=adapter.answer.sentence if adapter else "",
        adapter_notes=tuple(filter(None, _format_adapter_notes(answers))),
        learning_rate=answers.learning_rate.sentence if answers.learning_rate else "",
        training_rank=decision.sentence if decision is not None else rank_text,
        estimate=answers.estimate.sentence if answers.estimate else "",
        verdict=""
        if decision is None
        else decision.verdict + (f" ({', '.join(decision.flags)})" if decision.flags else ""),
        safe_choice="" if decision is None or decision.verdict != "undecided" else _format_safe_choice(decision),
        metrics=() if decision is None else tuple(map(_format_metric_answer, decision.other_metrics)),
        next_runs=tuple((run.sentence, command) for run, command in zip_longest(answers.next_runs, commands)),
    )


def _format_safe_choice(decision: Decision) -> str:
    if decision.requested_confidence is not None:
        return ""  # The decision's sentence already names the rank to use.
    if decision.fallback_rank is None:
        return f"No rank is proven to be enough yet; rank {decision.best_so_far} has the best value so far."
    return f"Until the answer is decided, rank {decision.fallback_rank} is the safe choice at the margin of {decision.margin:g}."


def format_labelled_rows(rows: Iterable[tuple[str, str | None]], width: int) -> list[str]:
    """Format rows as `label: text` lines whose texts start at column `width`; rows without a text are skipped."""
    return [f"{f'{label}:' if label else '':<{width - 1}} {text}" for label, text in rows if text]


def _format_adapter_notes(answers: Answers) -> list[str]:
    if answers.adapter is None:
        return []
    answer, handed_over = answers.adapter.answer, answers.adapter.handed_over
    return [
        f"It was {answers.provenance}." if answers.provenance else "",
        f"It loads as rank {handed_over.load_rank}." if handed_over.load_rank else "",
        f"Rank {answer.rank} is the largest rank that was trained, so a larger one may be better. --extend also trains rank "
        f"{2 * answer.rank}, at about the cost of this answer."
        if answer.is_top_rank_required
        else "",
        "Its learning rate is the lowest or the highest that was tried (lr_edge), so another one may be better."
        if answers.adapter_run
        else "",
        _format_test_result(handed_over),
        _format_repetition(answers, handed_over),
        LONGER_ADVICE if answers.goal == "adapter" and _is_built_in(answers.started) else "",
    ]


def _format_repetition(answers: Answers, handed_over: ExportedAdapter) -> str:
    """Describe the ranks at which to train again."""
    trained, decided = handed_over.trained_rank, None if answers.decision is None else answers.decision.rank
    is_truncated = handed_over.method == "truncated" and handed_over.rank < trained
    ways = [f"start at rank {trained} and truncate" if is_truncated else f"train at rank {trained}"]
    if decided is not None and decided != trained:
        ways.append(f"train at rank {decided}")
    return f"To train again, {', or '.join(ways)}."


def _is_built_in(started: RunStarted | None) -> bool:
    """Return whether the trainings are those of the built-in trainer, which can train for other numbers of steps."""
    return started is not None and started.kind is RunKind.SELECTION


def _format_test_result(handed_over: ExportedAdapter) -> str:
    """Describe the test-split result. Return "" if there is none, or if the exported adapter is the reference itself."""
    high = handed_over.test_difference_high
    if handed_over.test_difference is None or (handed_over.test_difference == 0 and not high):
        return ""
    bound = "" if high is None else f" (95% upper bound {high:+.2g})"
    return f"On the test split, it differs from the reference by {handed_over.test_difference:+.2g}{bound}."


def _format_metric_answer(metric_answer: MetricAnswer) -> str:
    if metric_answer.conflict:
        return metric_answer.sentence
    answer = f"rank {metric_answer.rank}" if metric_answer.rank else metric_answer.verdict.replace("_", " ")
    return f"{metric_answer.metric}: {answer}, at a margin of {format_brief(metric_answer.margin)}"


def format_brief(value: float | None) -> str:
    """Format a number with two significant digits; return "" for None."""
    return "" if value is None else "0" if abs(value) < 1e-12 else format_number(value)


def render_notebook_html(view: AnswerView, adapters: str, ranks: str) -> str:
    """Render each answer with its drawing (SVG) for a notebook. An answer that is not available is left out."""
    next_run = f" Next: {view.next_runs[0][0]}" if view.next_runs else ""
    sections = [
        (view.adapter_headline, view.adapter, adapters, ""),
        (
            view.rank_headline if view.verdict else "",
            view.training_rank,
            ranks,
            f"<p>Verdict: {_escape_html(view.verdict)}.{_escape_html(next_run)}</p>",
        ),
    ]
    style = 'role="img" style="display: block; width: 100%; height: auto"'
    return "".join(
        f"<div><p><strong>{_escape_html(headline)}</strong>. {_escape_html(sentence)}</p><div style='max-width: 40em'>{drawing.replace('<svg', f'<svg {style}', 1)}</div>{footer}</div>"
        for headline, sentence, drawing, footer in sections
        if headline
    )


def _escape_html(value: str) -> str:
    return escape(make_visible(value))
