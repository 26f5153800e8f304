"""The HTML that a notebook shows for a decision."""

from __future__ import annotations

from html import escape

from rightrank.records import Decision
from rightrank.report.draw import draw
from rightrank.report.format import visible
from rightrank.report.rank_curve import rank_figure
from rightrank.report.sentences import headline


def decision_html(decision: Decision) -> str:
    """The answer, the rank curve, the verdict and the next run."""
    figure = rank_figure(decision)
    drawing = draw(figure, "svg").decode()
    drawing = drawing[drawing.index("<svg") :]
    flags = f" ({', '.join(decision.flags)})" if decision.flags else ""
    return (
        f"<div><p><strong>{_text(headline(decision))}</strong>. {_text(decision.sentence)}</p>"
        f'<div role="img" aria-label="{_text(figure.alt)}" style="max-width: 40em; background: #fff">{drawing}</div>'
        f"<p>Verdict: {_text(decision.verdict + flags)}. Next: {_text(decision.next_run)}</p></div>"
    )


def _text(value: str) -> str:
    return escape(visible(value))
