"""Both answers of a run in words: one view, which terminal, status, notebook, report and card print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest

from rightrank.decision.records import Answers
from rightrank.decision.sentences import number
from rightrank.report.format import quantity, visible
from rightrank.schema.decision import Decision, HandedOver, MetricAnswer


@dataclass(frozen=True, slots=True)
class AnswerView:
    """Both answers in words; a part that is not known yet, or was not asked, is empty."""

    adapter_headline: str  # the first question in a few words
    rank_headline: str  # the second
    adapter: str  # the first question in a sentence
    # How it was made, what it loads as, whether a larger one may be better, the test split.
    adapter_notes: tuple[str, ...]
    training_rank: str  # the second; before its answer, what is missing
    estimate: str  # of the second, where it was not asked
    verdict: str  # with the flags in brackets
    safe_choice: str  # what is shown to be enough until an undecided answer is decided
    metrics: tuple[str, ...]  # what further metrics say
    next_runs: tuple[tuple[str, str | None], ...]  # each with its command, where one can be pasted

    @property
    def headline(self) -> str:
        """Both answers in a few words."""
        return " · ".join(filter(None, (self.adapter_headline, self.rank_headline))) or "Running: no answer yet"

    def rows(self) -> list[tuple[str, str]]:
        """Both answers as labelled lines; the second where it was asked, or has an estimate."""
        first = [("Adapter", self.adapter), *(("", note) for note in self.adapter_notes)] if self.adapter else []
        if not (self.verdict or self.estimate):
            return first
        second = [("Training rank", f"{self.training_rank} {self.estimate}".rstrip()), ("verdict", self.verdict)]
        metrics = [("metric", metric) for metric in self.metrics]
        return [*first, *second, *metrics, ("", self.safe_choice), *self.next_rows()]

    def next_rows(self) -> list[tuple[str, str]]:
        """Each next run, below it its command."""
        return [row for run, command in self.next_runs for row in (("next", run), ("", command or ""))]


def answer_view(answers: Answers, commands: Sequence[str | None] = ()) -> AnswerView:
    """The answers in words; `commands` are those of the next runs."""
    decision, adapter, asked = answers.decision, answers.adapter, answers.goal != "adapter"
    rank = "not known yet" if decision is None else decision.rank or decision.verdict.replace("_", " ")
    missing = "not asked (--goal adapter)."
    if decision is None and asked:
        so_far = quantity(answers.trainings, "training")
        missing = f"{so_far} so far. A comparison needs two ranks with a result."
    return AnswerView(
        adapter_headline=f"Adapter: rank {adapter.handed_over.rank_text}" if adapter else "",
        rank_headline="" if not asked or not (adapter or decision) else f"Training rank: {rank}",
        adapter=adapter.answer.sentence if adapter else "",
        adapter_notes=tuple(filter(None, _adapter_notes(answers))),
        training_rank=decision.sentence if decision is not None else missing,
        estimate=answers.estimate.sentence if answers.estimate else "",
        verdict=""
        if decision is None
        else decision.verdict + (f" ({', '.join(decision.flags)})" if decision.flags else ""),
        safe_choice="" if decision is None or decision.verdict != "undecided" else _safe_choice(decision),
        metrics=() if decision is None else tuple(map(_metric_text, decision.other_metrics)),
        next_runs=tuple((run.sentence, command) for run, command in zip_longest(answers.next_runs, commands)),
    )


def _safe_choice(decision: Decision) -> str:
    if decision.asked is not None:
        return ""  # the sentence names the rank to take
    if decision.fallback_rank is None:
        return f"No rank is shown to be enough; rank {decision.best_so_far} came out best so far, without proof."
    if decision.confidence is None:
        return f"Rank {decision.fallback_rank} is the smallest that one seed indicates to be enough at the margin of {decision.margin:g}."
    return (
        f"Until this is decided, rank {decision.fallback_rank} is the safe choice at the margin of {decision.margin:g}."
    )


def labelled(rows: Iterable[tuple[str, str | None]], width: int) -> list[str]:
    """`label: text` in lines, the texts below each other from column `width` on; a row without a text is left out."""
    return [f"{f'{label}:' if label else '':<{width - 1}} {text}" for label, text in rows if text]


def _adapter_notes(answers: Answers) -> list[str]:
    if answers.adapter is None:
        return []
    answer, handed_over = answers.adapter.answer, answers.adapter.handed_over
    return [
        f"It was {answers.making}." if answers.making else "",
        f"It loads as rank {handed_over.loads_as}." if handed_over.loads_as else "",
        f"Rank {answer.rank} is the largest that was trained, so a larger one may be better: --extend trains rank "
        f"{2 * answer.rank} too, for about the price of this answer."
        if answer.keeps_the_top
        else "",
        "Its learning rate is the lowest or the highest tried (lr_edge), so another one may be better."
        if answers.adapter_run
        else "",
        _test_text(handed_over),
    ]


def _test_text(handed_over: HandedOver) -> str:
    """The reading on the test split; empty without one, and where the adapter is the reference itself."""
    high = handed_over.test_difference_high
    if handed_over.test_difference is None or (handed_over.test_difference == 0 and not high):
        return ""
    bound = "" if high is None else f" (95% upper bound {high:+.2g})"
    return f"On the test split, read once, it differs from the reference by {handed_over.test_difference:+.2g}{bound}."


def _metric_text(other: MetricAnswer) -> str:
    if other.conflict:
        return other.sentence
    answer = f"rank {other.rank}" if other.rank else other.verdict.replace("_", " ")
    return f"{other.metric}: {answer}, at a margin of {brief(other.margin)}"


def brief(value: float | None) -> str:
    """Two significant digits; empty for None."""
    return "" if value is None else "0" if abs(value) < 1e-12 else number(value)


def notebook_html(view: AnswerView, adapters: str, ranks: str) -> str:
    """The answers, each with its drawing (SVG), for a notebook; without a drawing an answer is left out."""
    next_run = f" Next: {view.next_runs[0][0]}" if view.next_runs else ""
    parts = [
        (view.adapter_headline, view.adapter, adapters, ""),
        (view.rank_headline, view.training_rank, ranks, f"<p>Verdict: {_html(view.verdict)}.{_html(next_run)}</p>"),
    ]
    style = 'role="img" style="display: block; width: 100%; height: auto"'
    return "".join(
        f"<div><p><strong>{_html(headline)}</strong>. {_html(sentence)}</p><div style='max-width: 40em'>{drawing.replace('<svg', f'<svg {style}', 1)}</div>{further}</div>"
        for headline, sentence, drawing, further in parts
        if drawing
    )


def _html(value: str) -> str:
    return escape(visible(value))
