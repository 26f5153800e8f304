"""All strategies and baselines over all families of grids: the table, the picture, and every under-pick.

    python -m benchmarks.selection.compare --out benchmarks/selection/results.json

Minutes on one core. Baselines that can spend freely get the budget that the default strategy spent on the same grid.
Margins are those of each family's own scale.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from benchmarks.selection.baselines import DETERMINISTIC
from benchmarks.selection.baselines import STOCHASTIC as OPTUNA_AND_CHANCE
from benchmarks.selection.ray_asha import ray_asha
from benchmarks.selection.replay import Judged, judge, replay_all, summary
from benchmarks.selection.tables import GridCurve, read_grids
from rightrank.strategies import STRATEGIES, strategy_named

HERE = Path(__file__).parent
FAMILIES = {  # file, which of its grids, and margins in the metric's unit
    "published": ("published_grids.json", slice(None), (0.002, 0.005)),
    "planted, first half": ("planted_grids.json", slice(32), (0.002, 0.005, 0.02)),  # rules were found here
    "planted, second half": ("planted_grids.json", slice(32, None), (0.002, 0.005, 0.02)),
    "linear": ("linear_grids.json", slice(None), (0.005, 0.02, 0.05)),
    "real": ("real_grids.json", slice(None), (0.005, 0.01, 0.02)),
}
EQUAL_COST_WITH = "bracket"
STOCHASTIC = OPTUNA_AND_CHANCE | {"ASHA (Ray Tune)": ray_asha}
WITH_SEEDS = "bracket, two seeds"  # where a grid has them
REPEATS = 5  # of the stochastic baselines


def baseline_judged(
    name: str, curves: Sequence[GridCurve], margin: float, budgets: Sequence[float], seed: int
) -> list[Judged]:
    method = (DETERMINISTIC | STOCHASTIC)[name]
    judged = []
    for curve, budget in zip(curves, budgets, strict=True):
        pick = method(curve, margin, budget, np.random.default_rng([seed, len(curve.name)]))
        judged.append(judge(curve, margin, pick.rank, pick.learning_rate, pick.trainings))
    return judged


def family_results(curves: Sequence[GridCurve], margin: float) -> dict[str, list[list[Judged]]]:
    """Method → repeats → picks."""
    found = {name: [replay_all(curves, make, margin)] for name, make in STRATEGIES.items()}
    if all(len(curve.seeds) > 1 for curve in curves):
        found[WITH_SEEDS] = [replay_all(curves, STRATEGIES[EQUAL_COST_WITH], margin, seeds=2)]
    budgets = [one.trainings for one in found[EQUAL_COST_WITH][0]]
    for name in DETERMINISTIC:
        found[name] = [baseline_judged(name, curves, margin, budgets, 0)]
    for name in STOCHASTIC:
        found[name] = [baseline_judged(name, curves, margin, budgets, seed) for seed in range(REPEATS)]
    return found


def row(repeats: Sequence[Sequence[Judged]], ours: Sequence[Judged]) -> dict[str, Any]:
    """Means over repeats; and the paired comparison of regret with the default strategy, grid by grid."""
    rows = [summary(judged) for judged in repeats]
    mean = {key: round(float(np.mean([one[key] for one in rows])), 6) for key in rows[0]}
    pairs = [(mine.regret, other.regret) for judged in repeats for mine, other in zip(ours, judged, strict=True)]
    mean["default_wins"] = round(sum(mine < other for mine, other in pairs) / len(repeats), 2)
    mean["ties"] = round(sum(mine == other for mine, other in pairs) / len(repeats), 2)
    mean["default_loses"] = round(sum(mine > other for mine, other in pairs) / len(repeats), 2)
    return mean


def compare() -> dict[str, Any]:
    table: list[dict[str, Any]] = []
    unders: list[dict[str, Any]] = []
    for family, (file, which, margins) in FAMILIES.items():
        curves = read_grids(HERE / file)[which]
        for margin in margins:
            found = family_results(curves, margin)
            for name, repeats in found.items():
                table.append(
                    {"family": family, "margin": margin, "method": name, **row(repeats, found[EQUAL_COST_WITH][0])}
                )
            for name in STRATEGIES:
                unders += [
                    {"family": family, "margin": margin, "method": name, "grid": one.name, "truth": one.truth,
                     "pick": one.pick, "regret": round(one.regret, 6)}
                    for one in found[name][0]
                    if one.under
                ]  # fmt: skip
    return {"machine": machine(), "equal_cost_with": EQUAL_COST_WITH, "repeats": REPEATS, "table": table,
            "under_picks": unders}  # fmt: skip


def draw(results: dict[str, Any], path: Path) -> None:
    """Cost against regret, one panel a family, every method a point."""
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


def text(results: dict[str, Any]) -> str:
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
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    options = parser.parse_args()
    strategy_named(EQUAL_COST_WITH)
    results = compare()
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, options.out.with_name("cost_against_regret.svg"))
    options.out.with_suffix(".md").write_text(text(results) + "\n")
    print(json.dumps(results["machine"]))
    print(text(results))


if __name__ == "__main__":
    main()
