"""The HTML that a notebook shows for the two answers of a run."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rightrank.records import AdapterAnswer, AdapterCandidate, Decision
from rightrank.report.adapter_view import figure_of
from rightrank.report.draw import scalable_svg
from rightrank.report.figure import Figure
from rightrank.report.format import visible
from rightrank.report.rank_curve import rank_figure
from rightrank.report.sentences import headline


def adapter_html(
    answer: AdapterAnswer, adapters: Sequence[AdapterCandidate], metric: str, higher_is_better: bool
) -> str:
    """The answer to the first question and its picture."""
    drawing = _drawing(figure_of(answer, adapters, metric, higher_is_better))
    return f"<div><p><strong>Adapter: rank {answer.rank}</strong>. {_text(answer.sentence)}</p>{drawing}</div>"


def decision_html(decision: Decision) -> str:
    """The training rank, the rank curve, the verdict and the next run."""
    flags = f" ({', '.join(decision.flags)})" if decision.flags else ""
    return (
        f"<div><p><strong>{_text(headline(decision))}</strong>. {_text(decision.sentence)}</p>"
        f"{_drawing(rank_figure(decision))}"
        f"<p>Verdict: {_text(decision.verdict + flags)}. Next: {_text(decision.next_run)}</p></div>"
    )


def _drawing(figure: Figure) -> str:
    drawing = scalable_svg(figure).replace("<svg", '<svg style="display: block; width: 100%; height: auto"', 1)
    return f'<div role="img" aria-label="{_text(figure.alt)}" style="max-width: 40em; background: #fff">{drawing}</div>'


def _text(value: str) -> str:
    return escape(visible(value))
