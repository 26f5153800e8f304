"""Compare the average of two seeds, and twice the steps, with the two seeds at the same rank, on the test split of the locked grids.

    python -m benchmarks.learning_rate.averages    # writes averages.json

Averages, and trainings of twice the steps, are those of the learning rate with the lowest validation loss. Differences are from the mean of both seeds at the
average's learning rate. They are means over three pairs of seeds, with 95% intervals over test examples; their mean over the grids has an interval that resamples grids.
"""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.learning_rate.judge import BASES, GRIDS, read_seed
from benchmarks.learning_rate.lock import HERE
from benchmarks.learning_rate.policies import TOP, Floats, Key, SeedTable, compute_bound, resample_grids

RANKS = (64, 16, 4)
RESULTS = HERE / "averages.json"


def find_losses(
    table: SeedTable, kind: str, rank: int, rate: float | None = None, second_seed: int | None = None
) -> Any:
    """Return the test losses of an adapter at a rank, and its learning rate: the one given, or the best of the untruncated adapters."""
    if rate is None:
        keys = [key for key in table.adapters if (key.kind, key.other, key.fraction) == (kind, second_seed, 1)]
        rate = min(keys, key=lambda key: table.adapters[key].validation_mean).rate
    is_truncated = kind == "average" or rank < TOP  # An average has rank 128.
    name = f"{kind} truncated".removeprefix("trained ") if is_truncated else kind
    return table.adapters[Key(name, rank, rate, other=second_seed)].test, rate


def compare_pair(earlier: SeedTable, later: SeedTable) -> dict[str, Floats]:
    """Return, for each test example, the difference from the mean of both seeds by adapter and rank."""
    differences = {}
    for rank in RANKS:
        average, rate = find_losses(later, "average", rank, second_seed=earlier.seed)
        seeds = np.mean([find_losses(table, "trained", rank, rate)[0] for table in (earlier, later)], 0)
        differences[f"average, {rank}"] = average - seeds
        differences[f"twice the steps, {rank}"] = find_losses(later, "long", rank)[0] - seeds
    return differences


def compare_grid(grid: str) -> dict[str, Any]:
    """Return mean, and lower and upper 95% bound, of each difference."""
    tables = [read_seed(path) for path in sorted(GRIDS.glob(f"{grid}_*.npz"))]
    pairs = [compare_pair(*pair) for pair in combinations(tables, 2)]
    row: dict[str, Any] = {"grid": grid, "base": BASES[grid], "pairs": len(pairs), "differences": {}}
    for name in pairs[0]:
        values = np.mean([pair[name] for pair in pairs], 0)
        mean, error, _ = compute_bound(values, tables[0].test_weights, tables[0].test_groups)
        row["differences"][name] = [round(mean + sign * 1.96 * error, 4) for sign in (0, -1, 1)]
    return row


def main() -> None:
    rows = [compare_grid(grid) for grid in sorted({path.stem.rpartition("_")[0] for path in GRIDS.glob("*.npz")})]
    means = {
        name: resample_grids({row["grid"]: [row["differences"][name][0]] for row in rows})
        for name in rows[0]["differences"]
    }
    RESULTS.write_text(json.dumps({"rows": rows, "mean": means}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
