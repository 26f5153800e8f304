"""Measure whether the intervals cover, whether the rule errs as often as it states, and whether the answer is near the truth.

    python -m benchmarks.decide.calibration            # prints the table, writes calibration.json and undecided.svg
    python -m benchmarks.decide.calibration --tables 20 --short

Simulated tables (see simulated.py): four shapes of curve, normal and heavy tails, examples of unequal variance and
length, ranks correlated along the curve, 1 to 5 seeds, 50 to 2,000 examples.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.decide.simulated import (
    RANKS,
    World,
    draw_table,
    draw_true_losses,
    find_true_rank,
    scale_noise,
    with_quiet_seeds,
)
from benchmarks.machine import describe_machine
from rightrank.decision.comparison import CONFIDENCE
from rightrank.decision.evidence import Evidence
from rightrank.decision.rule import decide_table
from rightrank.decision.table import Cell, ScoreTable

HERE = Path(__file__).parent
SHAPES = ("power", "flat", "u_shaped", "rising")
QUIET = ((2, 200), (3, 200), (5, 2000))
SIZES = ((1, 200), (1, 1000), (2, 50), (2, 200), (3, 200), (3, 1000), (5, 200), (5, 2000))
NOISES = (0.25, 0.5, 1.0, 2.0, 4.0)
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
    false: float  # share of tables that name a rank that is worse by more than the margin
    fallback_false: float  # the same for `fallback_rank`
    best_false: float  # the same for the rank that would be handed over, including `best_so_far`
    decided: float
    within_octave: float  # among decided tables
    exact: float
    under: float


def judge_world(world: World, tables: int, seed: int) -> WorldResult:
    """Draw tables of one world, decide on them and compare the decisions with the truth."""
    generator = np.random.default_rng(seed)
    covers: list[bool] = []
    bounds: list[bool] = []
    values: list[bool] = []
    named: list[tuple[int, int, bool]] = []  # rank, truth, whether the rank is worse than the margin
    shown: list[bool] = []
    handed: list[bool] = []
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
        decision = decide_table(table, world.margin, confidence=None)
        bad = {rank: bool(losses[index] - losses.min() >= world.margin) for index, rank in enumerate(RANKS)}
        shown.append(decision.fallback_rank is not None and bad[decision.fallback_rank])
        handed.append(bad[decision.best_available_rank])
        if decision.rank is not None:
            named.append((decision.rank, find_true_rank(losses, world.margin), bad[decision.rank]))
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
        false=sum(bad for _, _, bad in named) / tables,
        fallback_false=float(np.mean(shown)),
        best_false=float(np.mean(handed)),
        decided=len(named) / tables,
        within_octave=_compute_share([abs(np.log2(rank / right)) <= 1 for rank, right, _ in named]),
        exact=_compute_share([rank == right for rank, right, _ in named]),
        under=_compute_share([rank < right for rank, right, _ in named]),
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
    decided = sum(result.decided for result in several)
    return {
        "covers, two seeds or more": _compute_mean([result.covers for result in several]),
        "covers, one seed": _compute_mean([result.covers for result in single]),
        "value covers, two seeds or more": _compute_mean([result.value_covers for result in several]),
        "covers, quiet seeds": _compute_mean([result.covers for result in quiet_seeds]),
        "one-sided bound holds": _compute_mean([result.bounds for result in several]),
        "false acceptance, mean": _compute_mean([result.false for result in several]),
        "false acceptance, worst world": max((result.false for result in several), default=float("nan")),
        "false fallback, worst world": max((result.fallback_false for result in several), default=float("nan")),
        "false hand-over, worst world": max((result.best_false for result in several), default=float("nan")),
        "false indication, one seed": _compute_mean([result.false for result in single]),
        "within an octave, of all decided": sum(result.within_octave * result.decided for result in several)
        / max(decided, 1e-9),
        "decided": _compute_mean([result.decided for result in several]),
        "decided, one seed": _compute_mean([result.decided for result in single]),
        "least covers": min((result.covers for result in several), default=float("nan")),
        "most covers": max((result.covers for result in several), default=float("nan")),
    }


def measure_undecided_by_noise(tables: int, seed: int) -> dict[str, dict[str, float]]:
    """Return the share of undecided tables by noise, with 2 seeds × 200 examples."""
    return {
        shape: {
            str(noise): 1 - judge_world(scale_noise(World(shape, 2, 200, "heavy"), noise), tables, seed).decided
            for noise in NOISES
        }
        for shape in SHAPES
    }


def measure_at_margin(tables: int, seed: int) -> dict[str, float]:
    """Return the share of two-rank tables that name the lower rank although it is worse by exactly the margin; 5% are allowed.

    Each table has 300 examples. Seeds differ by a quarter of the margin to the full margin, more than on the grids that the expected noise comes from.
    """
    margin, shares = 0.02, {}
    for seeds, deviation in product((2, 3), (0.005, 0.01, 0.02)):
        generator, named = np.random.default_rng(seed), 0
        for _ in range(tables):
            ease, cells = generator.normal(2, 0.5, 300), {}
            for rank, worse in ((4, margin), (16, 0.0)):
                example_losses = ease + generator.normal(worse, margin, 300)
                for number in range(seeds):
                    sums = example_losses + generator.normal(0, margin, 300) + generator.normal(0, deviation)
                    cells[rank, 1e-3, number] = Cell(f"{rank} {number}", float(sums.mean()), sums, np.ones(300))
            named += decide_table(ScoreTable("loss", False, cells, kind="loss"), margin, confidence=None).rank == 4
        shares[f"{seeds} seeds, deviation {deviation:g}"] = named / tables
    return shares


def draw_undecided(shares: dict[str, dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for shape, by_noise in shares.items():
        noises = [float(noise) for noise in by_noise]
        axes.plot(noises, [100 * share for share in by_noise.values()], "o-", label=shape.replace("_", "-"))
    axes.set_xscale("log", base=2)
    axes.set_xticks(NOISES, [f"{noise:g}×" for noise in NOISES])
    axes.set_xlabel("noise of a difference, 2 seeds × 200 items (1×: half the margin)")
    axes.set_ylabel("undecided, %")
    axes.set_ylim(-3, 103)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def print_table(results: list[WorldResult]) -> None:
    print("shape     seeds items tails  scored  covers bound  value  false  handed decided octave exact under")
    for result in results:
        print(
            f"{result.world:9} {result.seeds:5} {result.items:5} {result.tails:6} {'items' if result.scored else 'means':6}  "
            f"{result.covers:.3f}  {result.bounds:.3f}  {result.value_covers:.3f}  {result.false:.3f}  {result.best_false:.3f}  "
            f"{result.decided:7.2f} {result.within_octave:.3f}  {result.exact:.2f}  {result.under:.2f}"
        )


def _compute_share(values: list[bool]) -> float:
    return float(np.mean(values)) if values else 1.0


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
    shares = measure_undecided_by_noise(arguments.tables, SEED)
    at_margin = measure_at_margin(30 * arguments.tables, SEED)
    totals["named at the margin, noisy seeds, worst"] = max(at_margin.values())
    draw_undecided(shares, HERE / "undecided.svg")
    result = {
        "machine": describe_machine(),
        "seed": SEED,
        "seconds": round(time.perf_counter() - start_time),
        "summary": totals,
        "undecided_by_noise": shares,
        "at_the_margin": at_margin,
        "worlds": [asdict(world_result) for world_result in results],
    }
    (HERE / "calibration.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
