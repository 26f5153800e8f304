"""What a sweep found: as a table for the terminal, and settings × ranks as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from rightrank.records import SweepRow
from rightrank.report.figure import HeatMap, best_column

SHARED = "shared by all ranks"


def sweep_text(rows: Sequence[SweepRow]) -> str:
    """One line a setting and rank."""
    wide = max([24, *(len(row.setting) for row in rows)])
    lines = [
        f"{'setting':<{wide}} {'rank':>5} {'rate':>9} {'held-out':>10} {'gain':>9} {'parameters':>12} {'shared':>12}"
    ]
    lines += [
        f"{row.setting:<{wide}} {row.rank:>5} {row.learning_rate:>9g} {row.value:>10.4f} {row.gain:>+9.4f} "
        f"{_count(row.parameters)} {_count(row.shared_parameters)}"
        for row in rows
    ]
    return "\n".join(lines)


def _count(parameters: int | None) -> str:
    return f"{'–' if parameters is None else f'{parameters:,}':>12}"


def sweep_map(rows: Sequence[SweepRow], metric: str, higher_is_better: bool) -> HeatMap | None:
    """Rank × setting, each at its own best rate: whether what is best depends on the rank. None without a sweep."""
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
        ("", *(f"rate {found[rank, name].learning_rate:g}" if (rank, name) in found else "" for name in settings))
        for rank in ranks
    )
    best = tuple(best_column(row, not higher_is_better) for row in values)
    columns = (SHARED, *settings)
    said = ", ".join(
        f"rank {rank} {columns[place]}" for rank, place in zip(ranks, best, strict=True) if place is not None
    )
    return HeatMap(
        name="sweep",
        title="Other settings, each at its own best rate",
        alt=f"Held-out {metric} of the ranks that matter under further settings. Best: {said}.",
        row_label="rank",
        column_label="setting",
        row_names=tuple(str(rank) for rank in ranks),
        column_names=columns,
        values=values,
        notes=notes,
        best=best,
        lower_is_better=not higher_is_better,
    )
