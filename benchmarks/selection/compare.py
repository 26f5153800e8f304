"""Compare all strategies and baselines on all families of grids: a table, the plot, and every under-pick.

    python -m benchmarks.selection.compare --out benchmarks/selection/results.json

Takes minutes on one core. Baselines with a free budget get the budget that the default strategy spent on the same grid.
Margins are in each family's own scale.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine
from benchmarks.selection.baselines import DETERMINISTIC, STOCHASTIC
from benchmarks.selection.replay import Judged, judge, replay_all, summarize
from benchmarks.selection.tables import GridCurve, list_seed_orders, read_grids
from rightrank.search.strategies import STRATEGIES

HERE = Path(__file__).parent
FAMILIES = {  # file, which of its grids, and margins in the metric's unit
    "published": ("published_grids.json", slice(None), (0.002, 0.005)),
    "planted, first half": (
        "planted_grids.json.xz",
        slice(32),
        (0.002, 0.005, 0.02),
    ),  # the rules were developed on these
    "planted, second half": ("planted_grids.json.xz", slice(32, None), (0.002, 0.005, 0.02)),
    "planted, new": (
        "planted_new_grids.json.xz",
        slice(None),
        (0.002, 0.005, 0.02),
    ),  # these were not used for any choice
    "linear": ("linear_grids.json.xz", slice(None), (0.005, 0.02, 0.05)),
    "real, short, no early looks": ("real_grids.json.xz", slice(None), (0.005, 0.01, 0.02)),
    "real, short": ("seeded_short_grids.json.xz", slice(None), (0.005, 0.01, 0.02)),
    "real, 400 steps": ("seeded_grids.json.xz grids/*.json.xz", slice(None), (0.005, 0.02, 0.05)),
}
LOCKED = "locked"  # the family of `judged.json`
EACH_SEED_FIRST = ("real, short", "real, 400 steps", LOCKED)  # families with few grids, where each seed is a case
EQUAL_COST_WITH = "bracket"
WITH_SEEDS = "bracket, two seeds"  # if a grid has them
REPEATS = 5  # of the stochastic baselines
RESAMPLES = 2000  # of grids, for the intervals


def read_curves(family: str) -> list[GridCurve]:
    """Read the grids of a family; if a family has few, each of their seeds comes first in turn."""
    curves = read_full_grids(family)
    return [turned for curve in curves for turned in list_seed_orders(curve)] if family in EACH_SEED_FIRST else curves


def read_full_grids(family: str) -> list[GridCurve]:
    files, which, _ = FAMILIES[family]
    paths = [path for pattern in files.split() for path in sorted(HERE.glob(pattern))]
    return [curve for path in paths for curve in read_grids(path)][which]


def judge_baseline(
    name: str, curves: Sequence[GridCurve], margin: float, budgets: Sequence[float], seed: int
) -> list[Judged]:
    method = (DETERMINISTIC | STOCHASTIC)[name]
    judged = []
    for curve, budget in zip(curves, budgets, strict=True):
        pick = method(curve, margin, budget, np.random.default_rng([seed, len(curve.name)]))
        judged.append(judge(curve, margin, pick.rank, pick.learning_rate, pick.trainings))
    return judged


def judge_family(curves: Sequence[GridCurve], margin: float) -> dict[str, list[list[Judged]]]:
    """Return the judged picks of each method and repeat."""
    results = {name: [replay_all(curves, make, margin)] for name, make in STRATEGIES.items()}
    if all(len(curve.seeds) > 1 for curve in curves):
        results[WITH_SEEDS] = [replay_all(curves, STRATEGIES[EQUAL_COST_WITH], margin, seeds=2)]
    budgets = [pick.trainings for pick in results[EQUAL_COST_WITH][0]]
    for name in DETERMINISTIC:
        results[name] = [judge_baseline(name, curves, margin, budgets, 0)]
    for name in STOCHASTIC:
        results[name] = [judge_baseline(name, curves, margin, budgets, seed) for seed in range(REPEATS)]
    return results


def build_row(repeats: Sequence[Sequence[Judged]], ours: Sequence[Judged]) -> dict[str, Any]:
    """Return means over repeats, and the paired comparison of regret with the default strategy, grid by grid."""
    rows = [summarize(judged) for judged in repeats]
    mean = {key: round(float(np.mean([row[key] for row in rows])), 6) for key in rows[0]}
    pairs = [
        (our_pick.regret, their_pick.regret)
        for judged in repeats
        for our_pick, their_pick in zip(ours, judged, strict=True)
    ]
    mean["default_wins"] = round(sum(our_pick < their_pick for our_pick, their_pick in pairs) / len(repeats), 2)
    mean["ties"] = round(sum(our_pick == their_pick for our_pick, their_pick in pairs) / len(repeats), 2)
    mean["default_loses"] = round(sum(our_pick > their_pick for our_pick, their_pick in pairs) / len(repeats), 2)
    return mean


def summarize_margins(family: str, method: str, repeats: Sequence[Sequence[Judged]]) -> dict[str, Any]:
    """Return shares over all margins of a family, with 95% intervals that resample grids together with their seeds and margins."""
    by_grid: dict[str, list[Judged]] = {}
    for pick in (pick for judged in repeats for pick in judged):
        by_grid.setdefault(pick.name.partition(", seed ")[0], []).append(pick)
    entry: dict[str, Any] = {"family": family, "method": method, "grids": len(by_grid)}
    entry["cases"] = sum(map(len, by_grid.values()))
    entry["abstentions"] = sum(pick.pick is None for judged in by_grid.values() for pick in judged)
    for name in ("exact", "under"):
        shares = np.array([np.mean([getattr(pick, name) for pick in judged]) for judged in by_grid.values()])
        weights = np.array([len(judged) for judged in by_grid.values()], dtype=float)
        entry[name] = round(float(np.average(shares, weights=weights)), 4)
        entry[f"{name}_interval"] = compute_share_interval(shares, weights)
    entry["trainings"] = round(float(np.mean([pick.trainings for judged in by_grid.values() for pick in judged])), 2)
    return entry


def compute_share_interval(shares: np.ndarray, weights: np.ndarray) -> list[float]:
    """Return the 95% interval of a mean over grids. If all grids agree on 0 or 1, return the exact binomial interval."""
    count = len(shares)
    if shares.max() == 0 or shares.min() == 1:
        reach = 1 - 0.025 ** (1 / count)
        return [0.0, round(reach, 3)] if shares.max() == 0 else [round(1 - reach, 3), 1.0]
    draws = np.random.default_rng(0x5EED).integers(count, size=(RESAMPLES, count))
    means = (shares[draws] * weights[draws]).sum(axis=1) / weights[draws].sum(axis=1)
    return [round(float(end), 3) for end in np.quantile(means, (0.025, 0.975))]


def compare(families: Iterable[str]) -> dict[str, Any]:
    table: list[dict[str, Any]] = []
    unders: list[dict[str, Any]] = []
    means: list[dict[str, Any]] = []
    for family in families:
        curves, margins = read_curves(family), FAMILIES[family][2]
        every: dict[str, list[list[Judged]]] = {}
        for margin in margins:
            judged_by_method = judge_family(curves, margin)
            for name, repeats in judged_by_method.items():
                every.setdefault(name, []).extend(repeats)
            for name, repeats in judged_by_method.items():
                table.append(
                    {
                        "family": family,
                        "margin": margin,
                        "method": name,
                        **build_row(repeats, judged_by_method[EQUAL_COST_WITH][0]),
                    }
                )
            for name in STRATEGIES:
                unders += [
                    {"family": family, "margin": margin, "method": name, "grid": pick.name, "truth": pick.truth,
                     "pick": pick.pick, "regret": round(pick.regret, 6)}
                    for pick in judged_by_method[name][0]
                    if pick.under
                ]  # fmt: skip
        means += [summarize_margins(family, name, repeats) for name, repeats in every.items()]
    return {"machine": describe_machine(), "equal_cost_with": EQUAL_COST_WITH, "repeats": REPEATS, "table": table,
            "means": means, "under_picks": unders}  # fmt: skip


def draw_cost_against_regret(results: dict[str, Any], path: Path) -> None:
    """Plot cost against regret, one panel for each family and one point for each method."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    families = list(dict.fromkeys(row["family"] for row in results["table"]))
    columns = 3
    lines = -(-len(families) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, 4.2 * lines), squeeze=False)
    methods = list(dict.fromkeys(row["method"] for row in results["table"]))
    colours = dict(zip(methods, plt.colormaps["tab20"].colors, strict=False))
    points: dict[str, Any] = {}
    for axis in axes.flat[len(families) :]:
        axis.set_axis_off()
    for axis, family in zip(axes.flat, families, strict=False):
        rows = [row for row in results["table"] if row["family"] == family]
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["method"] == method]
            if all(row["abstentions"] == row["curves"] for row in mine):
                continue
            cost = float(np.mean([row["mean_trainings"] for row in mine]))
            regret = float(np.mean([row["mean_excess_regret"] / row["margin"] for row in mine]))
            ours = method in STRATEGIES
            (points[method],) = axis.plot(
                cost, regret, "o" if ours else "x", color=colours[method], label=method, markersize=8, linestyle="none"
            )
        axis.set_yscale("symlog", linthresh=0.01)
        axis.set_ylim(bottom=-0.002)
        axis.set_title(f"{family} ({rows[0]['curves']:g} grids)")
        axis.set_xlabel("whole trainings a grid")
    for line in axes:
        line[0].set_ylabel("mean regret beyond the margin, in margins")
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.legend(handles=[points[method] for method in methods if method in points], loc="lower center", ncols=6)
    figure.savefig(path, metadata={"Date": None})


def format_share(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.0%} ({low:.0%} to {high:.0%})"


def format_results(results: dict[str, Any]) -> str:
    lines = [
        "| family | margin | method | grids | exact | ± a rank | under | over | regret | trainings | share | wins / ties / losses of the default |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results["table"]:
        if r["abstentions"] == r["curves"]:
            continue
        lines.append(
            f"| {r['family']} | {r['margin']:g} | {r['method']} | {r['curves']:g} | {r['exact']:g} | {r['exact_or_neighbour']:g} "
            f"| {r['under_picks']:g} | {r['over_picks']:g} | {r['mean_excess_regret']:.5f} | {r['mean_trainings']:.2f} "
            f"| {r['share_of_cells']:.2f} | {r['default_wins']:g} / {r['ties']:g} / {r['default_loses']:g} |"
        )
    lines += [
        "",
        "Over all margins, with 95% intervals that resample grids.",
        "",
        "| family | method | grids | cases | exact | under | trainings |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['family']} | {r['method']} | {r['grids']} | {r['cases']} | {format_share(r, 'exact')} | {format_share(r, 'under')} | {r['trainings']:.1f} |"
        for r in results["means"]
        if r["abstentions"] < r["cases"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    options = parser.parse_args()
    results = compare(FAMILIES)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    draw_cost_against_regret(results, options.out.with_name("cost_against_regret.svg"))
    options.out.with_suffix(".md").write_text(format_results(results) + "\n")
    print(json.dumps(results["machine"]))
    print(format_results(results))


if __name__ == "__main__":
    main()
