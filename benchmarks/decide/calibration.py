"""Measure whether the intervals cover, and whether a rank that the bounds show to be enough is.

    python -m benchmarks.decide.calibration            # prints the table, writes calibration.json
    python -m benchmarks.decide.calibration --tables 20 --short

Simulated tables (see simulated.py): four shapes of curve, normal and heavy tails, examples of unequal variance and
length, ranks correlated along the curve, 1 to 5 seeds, 50 to 2,000 examples.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.decide.simulated import (
    RANKS,
    World,
    draw_table,
    draw_true_losses,
    find_shown_rank,
    with_quiet_seeds,
)
from benchmarks.machine import describe_machine
from rightrank.decision.comparison import CONFIDENCE
from rightrank.decision.evidence import Evidence
from rightrank.decision.rule import compare_ranks

HERE = Path(__file__).parent
SHAPES = ("power", "flat", "u_shaped", "rising")
QUIET = ((2, 200), (3, 200), (5, 2000))
SIZES = ((1, 200), (1, 1000), (2, 50), (2, 200), (3, 200), (3, 1000), (5, 200), (5, 2000))
SEED = 20260


@dataclass(frozen=True)
class WorldResult:
    """Results for one world, as shares of its `tables` tables."""

    world: str
    seeds: int
    items: int
    tails: str
    scored: bool
    name: str
    tables: int
    covers: float  # share of two-sided 95% intervals of differences from the highest rank that cover
    bounds: float  # share of one-sided 95% bounds of the same differences that cover
    value_covers: float  # share of two-sided 95% intervals of a rank's mean that cover
    fallback_false: (
        float  # share of tables in which a rank that the bounds show to be enough is worse by more than the margin
    )


def judge_world(world: World, tables: int, seed: int) -> WorldResult:
    """Draw tables of one world, decide on them and compare the decisions with the truth."""
    generator = np.random.default_rng(seed)
    covers: list[bool] = []
    bounds: list[bool] = []
    values: list[bool] = []
    false: list[bool] = []
    for _ in range(tables):
        losses = draw_true_losses(world, generator)
        table = draw_table(world, losses, generator)
        evidence = Evidence(table)
        top = evidence.contenders[RANKS[-1]]
        for index, rank in enumerate(RANKS):
            value_estimate = evidence.estimate_value(evidence.contenders[rank])
            values.append(value_estimate.compute_bound(0.025) <= losses[index] <= value_estimate.compute_bound(0.975))
            if rank != top.rank:
                difference = evidence.estimate_difference(evidence.contenders[rank], top)
                true = losses[index] - losses[-1]
                covers.append(difference.compute_bound(0.025) <= true <= difference.compute_bound(0.975))
                bounds.append(true <= difference.compute_bound(CONFIDENCE))
        fallback = find_shown_rank(compare_ranks(evidence, world.margin))
        false.append(fallback is not None and bool(losses[RANKS.index(fallback)] - losses.min() >= world.margin))
    return WorldResult(
        world=world.shape,
        seeds=world.seeds,
        items=world.items,
        tails=world.tails,
        scored=world.scored,
        name=world.name,
        tables=tables,
        covers=float(np.mean(covers)),
        bounds=float(np.mean(bounds)),
        value_covers=float(np.mean(values)),
        fallback_false=float(np.mean(false)),
    )


def list_worlds(short: bool) -> list[World]:
    if short:
        return [World(shape, 3, 200, "heavy") for shape in SHAPES]
    scored = [World(shape, s, i, tails) for s, i in SIZES for tails in ("normal", "heavy") for shape in SHAPES]
    # Without example scores the examples are fixed: intervals and truth only generalise to other seeds.
    bare = [
        World(shape, s, 200, "heavy", item_level=0.0, item_rank=0.0, example_noise=0.01, scored=False)
        for s in (2, 3, 5)
        for shape in SHAPES
    ]
    quiet_seeds = [with_quiet_seeds(World(shape, s, i, "heavy")) for s, i in QUIET for shape in SHAPES]
    return scored + bare + quiet_seeds


def summarize(results: list[WorldResult]) -> dict[str, float]:
    """Average over worlds with equal weights.

    Worlds with one seed, where intervals cannot cover seeds, and worlds with quiet seeds are averaged separately.
    """
    several = [result for result in results if result.seeds > 1 and not result.name]
    quiet_seeds = [result for result in results if result.name]
    single = [result for result in results if result.seeds == 1]
    return {
        "covers, two seeds or more": _compute_mean([result.covers for result in several]),
        "covers, one seed": _compute_mean([result.covers for result in single]),
        "value covers, two seeds or more": _compute_mean([result.value_covers for result in several]),
        "covers, quiet seeds": _compute_mean([result.covers for result in quiet_seeds]),
        "one-sided bound holds": _compute_mean([result.bounds for result in several]),
        "false fallback, mean": _compute_mean([result.fallback_false for result in several]),
        "false fallback, worst world": max((result.fallback_false for result in several), default=float("nan")),
        "least covers": min((result.covers for result in several), default=float("nan")),
        "most covers": max((result.covers for result in several), default=float("nan")),
    }


def print_table(results: list[WorldResult]) -> None:
    print("shape     seeds items tails  scored  covers bound  value  false")
    for result in results:
        print(
            f"{result.world:9} {result.seeds:5} {result.items:5} {result.tails:6} {'items' if result.scored else 'means':6}  "
            f"{result.covers:.3f}  {result.bounds:.3f}  {result.value_covers:.3f}  {result.fallback_false:.3f}"
        )


def _compute_mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=30)
    parser.add_argument("--short", action="store_true")
    arguments = parser.parse_args()
    start_time = time.perf_counter()
    results = [
        judge_world(world, arguments.tables, SEED + number) for number, world in enumerate(list_worlds(arguments.short))
    ]
    print_table(results)
    totals = summarize(results)
    print(json.dumps(totals, indent=1))
    if arguments.short:
        return
    result = {
        "machine": describe_machine(),
        "seed": SEED,
        "seconds": round(time.perf_counter() - start_time),
        "summary": totals,
        "worlds": [asdict(world_result) for world_result in results],
    }
    (HERE / "calibration.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
