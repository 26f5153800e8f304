"""Many selections side by side: for the terminal and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True, slots=True)
class MatrixRow:
    """How one selection of a matrix ended."""

    name: str
    verdict: str  # `failed` where it gave no decision
    rank: int | None  # the smallest that is enough; None: not decided
    handed_over: int | None  # the rank of the adapter in the job's folder
    learning_rate: float | None
    value: float | None  # held-out, of the rank handed over
    reference_rank: int | None
    trainings: int
    run: str
    reason: str = ""  # why it failed


def matrix_text(rows: Sequence[MatrixRow]) -> str:
    """One line a selection."""
    width = max(4, *(len(row.name) for row in rows))
    lines = [
        f"{'name':<{width}} {'rank':>5} {'adapter':>8} {'rate':>9} {'held-out':>10} {'best':>5} {'trainings':>10}  verdict"
    ]
    lines += [
        f"{row.name:<{width}} {_or_dash(row.rank):>5} {_or_dash(row.handed_over):>8} {_or_dash(row.learning_rate):>9} "
        f"{_or_dash(row.value, '.4f'):>10} {_or_dash(row.reference_rank):>5} {row.trainings:>10}  "
        f"{row.verdict}{': ' + row.reason if row.reason else ''}"
        for row in rows
    ]
    return "\n".join(lines)


def matrix_csv(rows: Sequence[MatrixRow]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(MatrixRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def _or_dash(value: float | None, form: str = "g") -> str:
    return "–" if value is None else format(value, form)
