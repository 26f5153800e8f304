"""Do the intervals cover, does the rule err as often as it says, is the answer near the truth?

    python -m benchmarks.decide.calibration            # prints the table, writes calibration.json and undecided.svg
    python -m benchmarks.decide.calibration --tables 20 --short

Simulated tables (see simulated.py): four shapes of curve, normal and heavy tails, examples of unequal variance and
length, ranks correlated along the curve, 1 to 5 seeds, 50 to 2,000 items.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.decide.simulated import RANKS, World, draw_table, scale_noise, with_quiet_seeds, find_true_rank, draw_true_losses
from benchmarks.machine import machine
from rightrank.decision.comparison import CONFIDENCE
from rightrank.decision.evidence import Evidence
from rightrank.decision.rule import decision_of
from rightrank.decision.table import Cell, ScoreTable

HERE = Path(__file__).parent
SHAPES = ("power", "flat", "u_shaped", "rising")
QUIET = ((2, 200), (3, 200), (5, 2000))
SIZES = ((1, 200), (1, 1000), (2, 50), (2, 200), (3, 200), (3, 1000), (5, 200), (5, 2000))
NOISES = (0.25, 0.5, 1.0, 2.0, 4.0)
SEED = 20260


@dataclass(frozen=True)
class WorldResult:
    """Of one world, shares of `tables` tables."""

    world: str
    seeds: int
    items: int
    tails: str
    scored: bool
    name: str
    tables: int
    covers: float  # two-sided 95% interval of the difference from the top rank, every rank
    bounds: float  # one-sided 95% bound of the same
    value_covers: float  # two-sided 95% interval of a rank's own mean
    false: float  # a rank worse than the margin was named
    fallback_false: float  # or was said to be shown to be enough (`fallback_rank`)
    best_false: float  # or would have been handed over, `best_so_far` included
    decided: float
    within_octave: float  # of the decided
    exact: float
    under: float


def judge_world(world: World, tables: int, seed: int) -> WorldResult:
    """Draw tables of one world and judge what is said of them."""
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
            value_estimate = evidence.value(evidence.contenders[rank])
            values.append(value_estimate.bound(0.025) <= losses[index] <= value_estimate.bound(0.975))
            if rank != top.rank:
                difference = evidence.difference(evidence.contenders[rank], top)
                true = losses[index] - losses[-1]
                covers.append(difference.bound(0.025) <= true <= difference.bound(0.975))
                bounds.append(true <= difference.bound(CONFIDENCE))
        decision = decision_of(table, world.margin, confidence=None)
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
    # without example scores the examples are what they are: intervals speak of other seeds, and so does the truth
    bare = [
        World(shape, s, 200, "heavy", item_level=0.0, item_rank=0.0, example_noise=0.01, scored=False)
        for s in (2, 3, 5)
        for shape in SHAPES
    ]
    quiet_seeds = [with_quiet_seeds(World(shape, s, i, "heavy")) for s, i in QUIET for shape in SHAPES]
    return scored + bare + quiet_seeds


def summarize(results: list[WorldResult]) -> dict[str, float]:
    """Over worlds, each with its own weight. Apart: one seed, where intervals can't cover seeds, and quiet seeds."""
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
    """Share undecided against noise, 2 seeds × 200 items."""
    return {
        shape: {
            str(noise): 1 - judge_world(scale_noise(World(shape, 2, 200, "heavy"), noise), tables, seed).decided
            for noise in NOISES
        }
        for shape in SHAPES
    }


def measure_at_margin(tables: int, seed: int) -> dict[str, float]:
    """Share of two ranks' tables that name the lower one, which is worse by the margin itself: 5% are allowed.

    300 examples; seeds differ by a quarter to the whole of the margin, more than on the grids that the expectation is of.
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
            named += decision_of(ScoreTable("loss", False, cells, kind="loss"), margin, confidence=None).rank == 4
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
    results = [judge_world(world, arguments.tables, SEED + number) for number, world in enumerate(list_worlds(arguments.short))]
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
        "machine": machine(),
        "seed": SEED,
        "seconds": round(time.perf_counter() - start_time),
        "summary": totals,
        "undecided_by_noise": shares,
        "at_the_margin": at_margin,
        "worlds": [asdict(one) for one in results],
    }
    (HERE / "calibration.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
