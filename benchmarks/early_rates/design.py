"""Print the table of candidates on the design grids, with leave-one-grid-out figures: python -m benchmarks.early_rates.design [FOLDER]."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

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
    tune_by_whole_trainings,
)

KINDS = ("current", "mean", "mean 5%", "mean 10%", "mean 25%", "current or mean", "annealed", "short", "mean product")
RATE_SETS = {"4 rates": RATES, "3 rates": RATES[1:], "5 rates": (*RATES, BEYOND)}


def measure_candidates(tables: list[GridTable]) -> Mapping[str, list[float]]:
    """Return by candidate the test loss of what it hands over minus that of rank 16, tuned, which hands over in the same way."""
    losses: dict[str, list[float]] = {}
    for table in tables:
        last = table.test[tune_baseline(table, hand_over_last)]
        losses.setdefault("the rule of before", []).append(table.test[choose_as_before(table)] - last)
        for name, hand_over in HANDOVERS.items():
            reference = table.test[tune_baseline(table, hand_over)]
            hindsight = min(table.test.get(hand_over(table, TOP, rate), math.inf) for rate in RATES)
            losses.setdefault(f"hindsight; {name}", []).append(hindsight - reference)
            losses.setdefault(f"16 tuned; {name}, minus last", []).append(reference - last)
            tuned = table.test[tune_by_whole_trainings(table, TOP, hand_over)]
            losses.setdefault(f"64 tuned; {name}", []).append(tuned - reference)
            for fraction, kind, choice, rates in product((0.25, 0.125), KINDS, CHOICES, RATE_SETS):
                keys = list_keys(table, kind, TOP, fraction, RATE_SETS[rates])
                if any(key in table.losses for key in keys.values()):
                    rate = CHOICES[choice](table, keys)
                    loss = table.test.get(hand_over(table, TOP, rate), table.base_test)
                    losses.setdefault(f"{kind} at {fraction:g}; {choice}; {rates}; {name}", []).append(loss - reference)
    return {name: values for name, values in losses.items() if len(values) == len(tables)}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "grids"
    paths = [folder / f"{grid.name}.npz" for grid in DESIGN]
    tables = [
        replace(read_table(path), examples=int(sys.argv[2]) if len(sys.argv) > 2 else 200)
        for path in paths
        if path.exists()
    ]
    print("grids:", ", ".join(table.grid.name for table in tables))
    losses = measure_candidates(tables)
    repeated = np.array([table.grid.is_repeated for table in tables])
    print("mean     worst    repeated  other    candidate")
    for name, values in losses.items():
        if " at " not in name:
            print_row(name, np.array(values), repeated)
    for name in HANDOVERS:
        candidates = {key: np.array(values) for key, values in losses.items() if key.endswith(f"; {name}") and " at " in key}  # fmt: skip
        names, matrix = list(candidates), np.array(list(candidates.values()))
        print(f"-- {name}")
        shown: set[bytes] = set()
        for index in np.argsort(matrix.mean(1)):
            if matrix[index].tobytes() not in shown and len(shown) < 8:
                print_row(names[index], matrix[index], repeated)
                shown.add(matrix[index].tobytes())
        for kind in ("current", "mean"):
            print_row(*next((key, values) for key, values in candidates.items() if key.startswith(f"{kind} at 0.25; best; 4")), repeated)  # fmt: skip
        left_out = []
        for number in range(len(tables)):
            best = int(np.delete(matrix, number, 1).mean(1).argmin())
            left_out.append(matrix[best, number])
        print(f"{np.mean(left_out):+.4f}  {np.max(left_out):+.4f}  leave one grid out")
    for table in tables:
        ends = {f"{rate:g}": [round(table.test.get(hand_over(table, TOP, rate), math.inf), 3) for hand_over in (hand_over_last, hand_over_best, HANDOVERS["best or best mean"])] for rate in RATES}  # fmt: skip
        chosen = {kind: f"{CHOICES['best'](table, list_keys(table, kind, TOP, 0.25)):g}" for kind in KINDS if kind == "current or mean" or (kind, TOP, RATES[1], 0.25) in table.losses}  # fmt: skip
        print(table.grid.name, ends, chosen)


def print_row(name: str, values: np.ndarray[Any, Any], repeated: np.ndarray[Any, Any]) -> None:
    print(f"{values.mean():+.4f}  {values.max():+.4f}  {values[repeated].mean():+.4f}  {values[~repeated].mean():+.4f}  {name}")  # fmt: skip


if __name__ == "__main__":
    main()
