"""Numbers, units and tables as text, the same in every view."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rightrank.schema.decision import Decision

CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
# Invisible characters that can disguise text: DEL, C1 controls, bidirectional marks, separators, surrogates.
HIDDEN = {
    0x7F: 0x2421,
    **dict.fromkeys(
        [*range(0x80, 0xA0), *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070)], 0xFFFD
    ),
    **dict.fromkeys([*range(0xD800, 0xE000), 0xFEFF, 0xFFFE, 0xFFFF], 0xFFFD),
}


def visible(text: str) -> str:
    """The text with control characters shown as symbols, so that data cannot change how a page reads."""
    return text.translate(CONTROL_PICTURES | HIDDEN)


def metric_unit(metric: str) -> str:
    """The unit of a metric's differences."""
    return "nats" if metric == "loss" else visible(metric)


def coverage(decision: Decision, noun: str) -> str:
    """`95% interval`; `interval over examples` for one seed; `interval` where the table shows no level."""
    if decision.confidence is not None:
        return f"{decision.confidence:.0%} {noun}"
    return f"{noun} over examples" if decision.basis.startswith("items") else noun


def quantity(count: float, noun: str) -> str:
    """`1 seed`, `3 seeds`, `4.3 trainings`."""
    text = f"{count:,.0f}" if float(count).is_integer() else f"{count:,.1f}"
    return f"{text} {noun}" + ("" if count == 1 else "s")


def amount(value: float) -> str:
    """Three significant digits, without an exponent above one."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes in a binary unit: `1.50 GiB`."""
    sign, count = ("-" if count < 0 else ""), abs(count)
    for unit, spec in (("B", ".0f"), ("KiB", ".1f"), ("MiB", ".1f"), ("GiB", ".2f")):
        if count < 1024:
            return f"{sign}{count:{spec}} {unit}"
        count /= 1024
    return f"{sign}{count:.2f} TiB"


def table_lines(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> list[str]:
    """One line a row, cells padded to their column's width; columns in `left` are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
