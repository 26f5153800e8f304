"""Print the table of candidates on the design grids, with leave-one-grid-out figures: python -m benchmarks.early_rates.design [FOLDER]."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.early_rates.grids import BEYOND, DESIGN, RATES, TOP
from benchmarks.early_rates.rules import (
    CHOICES,
    HANDOVERS,
    GridTable,
    choose_as_before,
    hand_over_best,
    hand_over_last,
    list_keys,
    read_table,
    tune_baseline,
)

KINDS = ("current", "mean", "mean 5%", "mean 10%", "mean 25%", "current or mean", "annealed", "short", "mean product")
RATE_SETS = {"4 rates": RATES, "3 rates": RATES[1:], "5 rates": (*RATES, BEYOND)}


def measure_candidates(tables: list[GridTable]) -> Mapping[str, list[float]]:
    """Return by candidate the test loss of what it hands over minus that of rank 16, tuned, with its best evaluation."""
    losses: dict[str, list[float]] = {}
    for table in tables:
        reference = table.test[tune_baseline(table, hand_over_best)]
        losses.setdefault("the rule of before", []).append(table.test[choose_as_before(table)] - reference)
        best_rate = min((table.test.get(hand_over_last(table, TOP, rate), math.inf), rate) for rate in RATES)[1]
        losses.setdefault("hindsight, last", []).append(table.test[hand_over_last(table, TOP, best_rate)] - reference)
        for fraction, kind, choice, rates in product((0.25, 0.125), KINDS, CHOICES, RATE_SETS):
            keys = list_keys(table, kind, TOP, fraction, RATE_SETS[rates])
            if not any(key in table.losses for key in keys.values()):
                continue
            rate = CHOICES[choice](table, keys)
            for name, hand_over in HANDOVERS.items():
                loss = table.test.get(hand_over(table, TOP, rate), table.base_test)
                losses.setdefault(f"{kind} at {fraction:g}; {choice}; {rates}; {name}", []).append(loss - reference)
    return {name: values for name, values in losses.items() if len(values) == len(tables)}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "grids"
    tables = [read_table(folder / f"{grid.name}.npz") for grid in DESIGN if (folder / f"{grid.name}.npz").exists()]
    print("grids:", ", ".join(table.grid.name for table in tables))
    losses = measure_candidates(tables)
    names, matrix = list(losses), np.array(list(losses.values()))
    order = np.argsort(matrix.mean(1))
    print("mean     worst    repeated  other    candidate")
    repeated = np.array([table.grid.is_repeated for table in tables])
    shown = [*order[:40], names.index("the rule of before"), names.index("hindsight, last")]
    shown += [names.index(f"{kind} at 0.25; best; 4 rates; {name}") for kind in KINDS for name in ("last", "best")]
    for index in shown:
        row = matrix[index]
        print(f"{row.mean():+.4f}  {row.max():+.4f}  {row[repeated].mean():+.4f}  {row[~repeated].mean():+.4f}  {names[index]}")  # fmt: skip
    left_out = []
    for number in range(len(tables)):
        others = np.delete(matrix, number, 1).mean(1)
        left_out.append((matrix[int(others.argmin()), number], names[int(others.argmin())]))
    print(f"leave one grid out: {np.mean([loss for loss, _ in left_out]):+.4f}")
    for table, (loss, name) in zip(tables, left_out, strict=True):
        print(f"  {table.grid.name}: {loss:+.4f} by {name}")
    for number, table in enumerate(tables):
        by_kind = {kind: CHOICES["best"](table, list_keys(table, kind, TOP, 0.25)) for kind in KINDS if (kind, TOP, RATES[1], 0.25) in table.losses or kind == "current or mean"}  # fmt: skip
        ends = {f"{rate:g}": round(table.test.get(hand_over_last(table, TOP, rate), math.inf), 3) for rate in RATES}
        print(table.grid.name, f"reference {table.test[tune_baseline(table, hand_over_best)]:.3f}", ends, {kind: f"{rate:g}" for kind, rate in by_kind.items()}, [f"{matrix[names.index(name), number]:+.3f}" for name in ("the rule of before", "mean at 0.25; best; 4 rates; best")])  # fmt: skip


if __name__ == "__main__":
    main()
