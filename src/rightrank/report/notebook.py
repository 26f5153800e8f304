"""What a notebook shows of a record."""

from __future__ import annotations

from html import escape

from rightrank.records import Decision, Record
from rightrank.report.draw import draw
from rightrank.report.facts import headline
from rightrank.report.figure import visible
from rightrank.report.rank_curve import rank_figure


def html_of(record: Record) -> str | None:
    """A decision with its plot; None for records that `repr` says enough of."""
    if not isinstance(record, Decision):
        return None
    figure = rank_figure(record)
    drawing = draw(figure, "svg").decode()
    drawing = drawing[drawing.index("<svg") :]
    flags = f" ({', '.join(record.flags)})" if record.flags else ""
    return (
        f"<div><p><strong>{_text(headline(record))}</strong>. {_text(record.sentence)}</p>"
        f'<div role="img" aria-label="{_text(figure.alt)}" style="max-width: 40em; background: #fff">{drawing}</div>'
        f"<p>Verdict: {_text(record.verdict + flags)}. Next: {_text(record.next_run)}</p></div>"
    )


def _text(value: str) -> str:
    return escape(visible(value))
