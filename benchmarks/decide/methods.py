"""Why the closed form: its coverage and time beside a two-way bootstrap, on the same tables.

    python -m benchmarks.decide.methods      # prints the table, writes methods.json

The difference of the lowest rank from the top one, 95% two-sided:

    moderated   the closed form with this pair's seed noise, moderated (what the decision uses)
    own         the closed form with this pair's seeds alone
    bootstrap   examples and seeds drawn with replacement (Owen 2007), 2,000 resamples, percentiles
    items only  the closed form that forgets seeds
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.decide.simulated import RANKS, World, draw_table, truth
from benchmarks.machine import machine
from rightrank.decision.comparison import estimate
from rightrank.decision.evidence import Evidence
from rightrank.decision.table import ScoreTable

HERE = Path(__file__).parent
SIZES = ((2, 200), (3, 200), (5, 200), (3, 1000))
RESAMPLES = 2000
Interval = tuple[float, float]


def moderated(table: ScoreTable) -> Interval:
    evidence = Evidence(table)
    found = evidence.difference(evidence.contenders[RANKS[0]], evidence.contenders[RANKS[-1]])
    return found.bound(0.025), found.bound(0.975)


def own(table: ScoreTable) -> Interval:
    found = estimate(*_differences(table))
    return found.bound(0.025), found.bound(0.975)


def items_only(table: ScoreTable) -> Interval:
    sums, weights = _differences(table)
    found = estimate(sums.mean(axis=0, keepdims=True), weights)
    return found.bound(0.025), found.bound(0.975)


def bootstrap(table: ScoreTable) -> Interval:
    sums, weights = _differences(table)
    seeds, items = sums.shape
    generator = np.random.default_rng(0)
    by_item = generator.multinomial(items, np.full(items, 1 / items), size=RESAMPLES).astype(np.float64)
    by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES).astype(np.float64)
    means = np.einsum("bs,bs->b", by_item @ sums.T, by_seed) / seeds / (by_item @ weights)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


METHODS = {"moderated": moderated, "own": own, "bootstrap": bootstrap, "items only": items_only}


def _differences(table: ScoreTable) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    low, top = (list(table.by_learning_rate(rank)[1e-3].values()) for rank in (RANKS[0], RANKS[-1]))
    return np.stack([a.sums - b.sums for a, b in zip(low, top, strict=True)]), low[0].weights


def study(world: World, tables: int, seed: int) -> dict[str, dict[str, float]]:
    """Coverage, mean width and milliseconds of each method."""
    generator = np.random.default_rng(seed)
    covers: dict[str, list[bool]] = {name: [] for name in METHODS}
    widths: dict[str, list[float]] = {name: [] for name in METHODS}
    seconds = dict.fromkeys(METHODS, 0.0)
    for _ in range(tables):
        losses = truth(world, generator)
        table = draw_table(world, losses, generator)
        for name, method in METHODS.items():
            begun = time.process_time()
            low, high = method(table)
            seconds[name] += time.process_time() - begun
            covers[name].append(low <= losses[0] - losses[-1] <= high)
            widths[name].append(high - low)
    return {
        name: {
            "covers": float(np.mean(covers[name])),
            "width": float(np.mean(widths[name])),
            "milliseconds": 1000 * seconds[name] / tables,
        }
        for name in METHODS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=300)
    asked = parser.parse_args()
    found = {}
    for seeds, items in SIZES:
        world = World("power", seeds, items, "heavy")
        found[f"{seeds} seeds, {items} items"] = study(world, asked.tables, 5)
    for size, methods in found.items():
        for name, one in methods.items():
            print(
                f"{size:22} {name:11} covers {one['covers']:.3f}  width {one['width']:.4f}  {one['milliseconds']:.1f} ms"
            )
    result = {"machine": machine(), "tables": asked.tables, "sizes": found}
    (HERE / "methods.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
