"""The results of several selections as a table: for the terminal and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from rightrank.report.format import or_dash, table_lines


@dataclass(frozen=True, slots=True)
class MatrixRow:
    """The result of one selection of a matrix."""

    name: str
    verdict: str  # `failed` without a decision
    rank: int | None  # the smallest that is enough; None: undecided
    handed_over: int | None  # the rank of the adapter in the job's folder
    learning_rate: float | None
    value: float | None  # held-out, of the rank handed over
    reference_rank: int | None
    trainings: float  # the cost in whole trainings
    run: str
    reason: str = ""  # of a failure


def matrix_text(rows: Sequence[MatrixRow]) -> str:
    """One line per selection."""
    heading = ["name", "rank", "adapter", "learning rate", "held-out", "best", "trainings", "verdict"]
    cells = [
        [
            row.name,
            or_dash(row.rank),
            or_dash(row.handed_over),
            or_dash(row.learning_rate),
            or_dash(row.value, ".4f"),
            or_dash(row.reference_rank),
            f"{row.trainings:.1f}",
            f"{row.verdict}: {row.reason}" if row.reason else row.verdict,
        ]
        for row in rows
    ]
    return "\n".join(table_lines([heading, *cells], left=(0, 7)))


def matrix_csv(rows: Sequence[MatrixRow]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(MatrixRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()
