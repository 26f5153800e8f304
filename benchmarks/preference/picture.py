"""The picture of the grid: held-out preference loss by rank at each learning rate, trained and truncated.

python -m benchmarks.preference.picture
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def means(cells: dict[str, dict[str, dict[str, float]]], learning_rate: str) -> tuple[list[int], list[float]]:
    ranks = sorted(int(rank) for rank in cells if learning_rate in cells[rank])
    return ranks, [fmean(cells[str(rank)][learning_rate].values()) for rank in ranks]


def draw(curve: dict[str, Any], out: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4))
    learning_rates = sorted({rate for cells in curve["seed_grid"].values() for rate in cells}, key=float)
    for number, rate in enumerate(learning_rates):
        colour = f"C{number}"
        axes.plot(*means(curve["seed_grid"], rate), "o-", color=colour, label=f"trained at {rate}")
        axes.plot(*means(curve["truncation_grid"], rate), "x--", color=colour, label=f"rank 64 truncated, {rate}")
        for rank, cells in curve["seed_grid"].items():
            by_seed = list(cells.get(rate, {}).values())  # empty where every seed diverged
            axes.plot([int(rank)] * len(by_seed), by_seed, ".", color=colour, markersize=4)
    axes.axhline(curve["base"], color="grey", linewidth=0.8, label="base, ln 2")
    axes.set_xscale("log", base=4)
    axes.set_xticks(curve["ranks"], [str(rank) for rank in curve["ranks"]])
    axes.set_xlabel("rank")
    axes.set_ylabel("held-out preference loss, nats a pair")
    axes.legend(fontsize=7, ncol=2)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    curve = json.loads((HERE / "grids.json").read_text(encoding="utf-8"))["curves"][0]
    draw(curve, HERE / "grid.svg")


if __name__ == "__main__":
    main()
