"""The results of a sweep: a table for the terminal, and a heat map of rank × setting."""

from __future__ import annotations

from collections.abc import Sequence

from rightrank.records import SweepRow
from rightrank.report.figure import HeatMap, best_column
from rightrank.report.format import or_dash, table_lines

SHARED = "shared by all ranks"


def sweep_text(rows: Sequence[SweepRow]) -> str:
    """One line per setting and rank."""
    heading = ["setting", "rank", "learning rate", "held-out", "gain", "parameters", "shared"]
    cells = [
        [
            row.setting,
            str(row.rank),
            f"{row.learning_rate:g}",
            f"{row.value:.4f}",
            f"{row.gain:+.4f}",
            or_dash(row.parameters, ","),
            or_dash(row.shared_parameters, ","),
        ]
        for row in rows
    ]
    return "\n".join(table_lines([heading, *cells], left=(0,)))


def sweep_map(rows: Sequence[SweepRow], metric: str, higher_is_better: bool) -> HeatMap | None:
    """Rank × setting, each at its best learning rate; it shows whether the best setting depends on the rank.

    None without a sweep.
    """
    if not rows:
        return None
    sign = 1 if higher_is_better else -1
    ranks = sorted({row.rank for row in rows})
    settings = list(dict.fromkeys(row.setting for row in rows))
    found = {(row.rank, row.setting): row for row in rows}
    shared = {row.rank: row.value - sign * row.gain for row in rows}
    values = tuple(
        (shared[rank], *(found[rank, name].value if (rank, name) in found else None for name in settings))
        for rank in ranks
    )
    notes = tuple(
        (
            "",
            *(
                f"learning rate {found[rank, name].learning_rate:g}" if (rank, name) in found else ""
                for name in settings
            ),
        )
        for rank in ranks
    )
    best = tuple(best_column(row, not higher_is_better) for row in values)
    columns = (SHARED, *settings)
    best_text = ", ".join(
        f"rank {rank} {columns[place]}" for rank, place in zip(ranks, best, strict=True) if place is not None
    )
    return HeatMap(
        name="sweep",
        title="Other settings, each at its best learning rate",
        alt=f"Held-out {metric} of the relevant ranks under further settings. Best: {best_text}.",
        row_label="rank",
        column_label="setting",
        row_names=tuple(str(rank) for rank in ranks),
        column_names=columns,
        values=values,
        notes=notes,
        best=best,
        lower_is_better=not higher_is_better,
    )
