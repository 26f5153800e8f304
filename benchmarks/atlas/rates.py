"""How the best learning rate moves with rank: `python -m benchmarks.atlas.rates`; writes `rates.json`.

From grids of rank by rate, ours (scale 32/r) and public ones. The best rate of a rank is the minimum of a parabola through its best rate and
the two beside it, in the logarithm of the rate; a rank whose best rate is the first or last is left out. An exponent is the slope of the
best rate over the rank, both in logarithms. `cost` is what a rank loses with the other rank's best rate in place of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

SELECTION = Path(__file__).parent.parent / "selection"
OURS = ("seeded_grids.json", "seeded_short_grids.json", "grids/newsgroups.json", "grids/senses_few.json")
Grid = Mapping[int, Mapping[float, float]]


def grids(file: str) -> Iterator[Grid]:
    """Rank, rate and loss of each curve of a file; lower is better."""
    for curve in json.loads((SELECTION / file).read_text(encoding="utf-8"))["curves"]:
        sign = -1 if curve["higher_is_better"] else 1
        yield {
            int(rank): {float(rate): sign * value for rate, value in rates.items() if value is not None}
            for rank, rates in curve["lr_grid"].items()
        }


def best_rate(rates: Mapping[float, float]) -> float | None:
    """The minimum of the parabola through the best rate and its neighbours; None at an edge."""
    ordered = sorted(rates)
    at = min(range(len(ordered)), key=lambda index: rates[ordered[index]])
    if at in (0, len(ordered) - 1):
        return None
    x = [math.log(ordered[index]) for index in (at - 1, at, at + 1)]
    a, b, _ = np.polyfit(x, [rates[ordered[index]] for index in (at - 1, at, at + 1)], 2)
    return math.exp(-b / (2 * a))


def exponent(grid: Grid) -> float | None:
    """Of the best rate over the rank; None where fewer than two ranks have one inside."""
    inside = [(rank, rate) for rank, rates in grid.items() if (rate := best_rate(rates)) is not None]
    if len(inside) < 2:
        return None
    return float(np.polyfit(np.log([r for r, _ in inside]), np.log([rate for _, rate in inside]), 1)[0])


def costs(grid: Grid) -> list[tuple[int, int, float]]:
    """From and to a rank, and what the best rate of the first costs at the second."""
    found = []
    for one, other in permutations(grid, 2):
        rate = min(grid[one], key=grid[one].__getitem__)
        if rate in grid[other]:
            found.append((one, other, grid[other][rate] - min(grid[other].values())))
    return found


def summary(files: tuple[str, ...]) -> dict[str, Any]:
    found = [grid for file in files for grid in grids(file)]
    exponents = [value for grid in found if (value := exponent(grid)) is not None]
    pairs = [pair for grid in found for pair in costs(grid)]
    up, down = ([c for a, b, c in pairs if (b > a) is side] for side in (True, False))
    return {
        "grids": len(found),
        "with_an_exponent": len(exponents),
        "exponent": [round(float(q), 2) for q in np.quantile(exponents, [0.1, 0.25, 0.5, 0.75, 0.9])],
        "cost_at_most_.005": {"upward": _share(up), "downward": _share(down)},
        "pairs": len(pairs),
    }


def _share(costs: list[float]) -> float:
    return round(sum(cost <= 0.005 for cost in costs) / len(costs), 3)


def main() -> None:
    found = {"ours, scale 32/r": summary(OURS), "16 published grids": summary(("published_grids.json",))}
    (Path(__file__).parent / "rates.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
