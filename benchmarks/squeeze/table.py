"""What the study's rows say: the best rates, the way of cutting that half of the tasks choose, and the judgement of the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One adapter of the study."""

    kind: str  # `base`, `top`, `direct`, `end`, `recovered`, or a way of cutting
    rank: int
    learning_rate: float
    seed: int
    choosing: float  # loss on the examples that choose a rate
    loss: float  # on those that are reported
    seconds: float  # of its training, an even share of its passes
    parameters: int


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def best_rates(rows: Sequence[Row]) -> dict[int, float]:
    """By rank, the rate with the best mean over the seeds that finished at every one of its trainings."""
    by_cell: dict[tuple[int, float], list[float]] = defaultdict(list)
    for row in rows:
        if row.kind in ("direct", "top"):
            by_cell[row.rank, row.learning_rate].append(row.choosing)
    most = max(map(len, by_cell.values()))
    cells = {cell: mean(values) for cell, values in by_cell.items() if len(values) == most}
    ranks = {rank for rank, _ in cells}
    return {rank: min((cells[cell], cell[1]) for cell in cells if cell[0] == rank)[1] for rank in ranks}


def best_rows(rows: Sequence[Row]) -> dict[tuple[str, int, int], Row]:
    """By kind, rank and seed; of the trainings at one rank, those at its best rate."""
    rates = best_rates(rows)
    direct = ("direct", "top")
    return {
        (row.kind, row.rank, row.seed): row
        for row in rows
        if row.kind not in direct or row.learning_rate == rates[row.rank]
    }


def choose(tasks: Mapping[str, Sequence[Row]], variants: Sequence[str]) -> dict[int, dict[str, float]]:
    """By rank, what each way of cutting loses against the whole top, as a share of what training gains: the mean over tasks of that over seeds."""
    shares: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for rows in tasks.values():
        best = best_rows(rows)
        (base,) = [row.loss for row in rows if row.kind == "base"]
        tops = {seed: row.loss for (kind, _, seed), row in best.items() if kind == "top"}
        gain = base - mean(list(tops.values()))
        losses: dict[tuple[int, str], list[float]] = defaultdict(list)
        for (kind, rank, seed), row in best.items():
            if kind in variants:
                losses[rank, kind].append((row.loss - tops[seed]) / gain)
        for (rank, kind), values in losses.items():
            shares[rank][kind].append(mean(values))
    return {rank: {kind: round(mean(of[kind]), 5) for kind in variants} for rank, of in sorted(shares.items())}
