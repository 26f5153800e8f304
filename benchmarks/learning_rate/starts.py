"""Replay the walk over learning rates on a public sweep of 35 models and on the stored grids, and write the table of starts.

    python -m benchmarks.learning_rate.starts

The sweep has final losses and the grids have the losses of the running mean at a quarter, by example. A walk can only train the rates that a
table has. A rate that the sweep tried and left out counts as diverged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.early_rates.rules import HANDOVERS, GridTable, read_table
from benchmarks.results import store_result
from rightrank.search.rates import RATES, choose_best_rate, choose_start_rates, find_next_rate
from rightrank.search.strategies import QUARTER

HERE = Path(__file__).parent
GRIDS = HERE.parent / "early_rates" / "grids"
TOP = 64
DRAWS, SAMPLE = 200, 200  # samples of the validation examples, and their size, as an evaluation at a quarter scores
PARAMETERS = {"SmolLM2": 135e6, "gemma": 270e6, "L6": 22.7e6, "L3": 17.4e6}  # by a part of the base's file name


@dataclass(frozen=True)
class Walk:
    """A walk on one table."""

    name: str
    parameters: float
    start: tuple[float, ...]
    visited: tuple[float, ...]  # in the order of training
    chosen: float
    among_all: float  # what a comparison of all rates of the table chooses, for 1.75 trainings with four rates
    best: float  # by the final losses
    regret: float  # nats, of the chosen rate's final loss against that of the best
    trainings: float  # a quarter for each rate that was tried, and the rest of the chosen one


def walk(losses: Mapping[float, float], start: Sequence[float]) -> list[float]:
    """Return the rates that the walk trains on a table, in their order."""
    rates = sorted(losses)
    visited = list(start)
    while (rate := find_next_rate({rate: losses[rate] for rate in visited}, rates)) is not None:
        visited.append(rate)
    return visited


def choose_start(parameters: float, rates: Sequence[float]) -> list[float]:
    """Return the neighbouring rates of a table that are nearest to the start, in log rate."""
    ordered = sorted(rates)
    pairs = list(pairwise(ordered))
    middle = float(np.log(choose_start_rates(int(parameters))).mean())
    return list(min(pairs, key=lambda pair: abs(float(np.log(pair).mean()) - middle)))


def replay(name: str, parameters: float, early: Mapping[float, float], final: Mapping[float, float]) -> Walk:
    """Replay the walk on the losses that it compares, and judge it by the final ones."""
    start = choose_start(parameters, list(early))
    visited = walk(early, start)
    chosen = choose_best_rate({rate: early[rate] for rate in visited})
    best = choose_best_rate(final)
    trainings = 1 + QUARTER * (len(visited) - 1)
    return Walk(
        name,
        parameters,
        tuple(start),
        tuple(visited),
        chosen,
        choose_best_rate(early),
        best,
        final[chosen] - final[best],
        trainings,
    )


def replay_sweep() -> list[Walk]:
    walks = []
    for row in json.loads((HERE / "tinker.json").read_text(encoding="utf-8"))["models"]:
        losses = dict.fromkeys(row["rates_tried"], math.inf)
        losses |= {float(rate): loss for rate, loss in row["losses"].items()}
        walks.append(replay(row["model"], row["billion_parameters"] * 1e9, losses, losses))
    return walks


def measure_means(table: GridTable, indices: Sequence[int] | None = None) -> dict[float, float]:
    """Return the loss of the running mean at a quarter by rate, over all validation examples or those at `indices`."""
    selected = slice(None) if indices is None else indices
    keys = {key[2]: key for key in table.losses if key[:2] == ("mean 25%", TOP) and key[3] == QUARTER}
    weight = table.weights[selected].sum()
    means = {rate: float(table.losses[key][selected].sum() / weight) for rate, key in keys.items()}
    rates = {key[2] for key in table.losses if key[2] in RATES}
    return dict.fromkeys(rates, math.inf) | means


def measure_handed_over(table: GridTable, rate: float) -> float:
    """Return the validation loss of what a training hands over: its best evaluation, of the factors or of their mean."""
    return table.measure(HANDOVERS["best or best mean"](table, TOP, rate))


def find_parameters(base: str) -> float:
    return next(count for part, count in PARAMETERS.items() if part in base)


def replay_grids() -> tuple[list[Walk], int, int]:
    """Return a walk for each grid, and how many draws of validation examples choose the best of all rates, of how many."""
    walks: list[Walk] = []
    num_equal = num_draws = 0
    generator = np.random.default_rng(0)
    for path in sorted(GRIDS.glob("*.npz")):
        if ".completed" in path.name:
            continue
        table = read_table(path)
        early = measure_means(table)
        final = {rate: measure_handed_over(table, rate) for rate in early}
        walks.append(replay(path.stem, find_parameters(table.grid.base), early, final))
        for _ in range(DRAWS):
            indices = generator.permutation(len(table.weights))[:SAMPLE]
            means = measure_means(table, indices)
            visited = walk(means, choose_start(find_parameters(table.grid.base), list(means)))
            num_equal += choose_best_rate({rate: means[rate] for rate in visited}) == choose_best_rate(means)
            num_draws += 1
    return walks, num_equal, num_draws


def summarize(walks: Sequence[Walk]) -> dict[str, Any]:
    steps_off = [min(abs(math.log10(rate / each.best)) for rate in each.start) / math.log10(3) for each in walks]
    return {
        "tables": len(walks),
        "trainings": float(np.mean([each.trainings for each in walks])),
        "chosen_as_among_all": sum(each.chosen == each.among_all for each in walks),
        "best_chosen": sum(each.chosen == each.best for each in walks),
        "within_002": sum(each.regret <= 0.002 for each in walks),
        "mean_regret": float(np.mean([each.regret for each in walks])),
        "largest_regret": max(each.regret for each in walks),
        "best_in_start": sum(each.best in each.start for each in walks),
        "most_steps_off": round(max(steps_off)),
    }


def format_page(result: Mapping[str, Any]) -> str:
    lines = [
        "# Where the walk over learning rates starts",
        "",
        "Below a billion parameters at .001 and .003, from a billion on at .0003 and .001 (`src/rightrank/search/rates.py`). Written by",
        "`python -m benchmarks.learning_rate.starts` from the stored tables; nothing is fitted, so no model is left out. The sweep has 128 long",
        "sequences a step and our grids 8 short rows; no correction for the batch is made: the walk finds the difference.",
        "",
        "| tables | chosen as among all rates | best rate chosen | within .002 nats | mean regret | largest | best in the first two | steps off at most | trainings |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ("sweep", "grids", "together"):
        row = result[name]
        lines.append(
            f"| {name} | {row['chosen_as_among_all']} | {row['best_chosen']} of {row['tables']} | {row['within_002']} | {row['mean_regret']:.4f} | {row['largest_regret']:.4f} | "
            f"{row['best_in_start']} | {row['most_steps_off']} | {row['trainings']:.2f} |"
        )
    equal, draws = result["draws"]
    lines += [
        "",
        "The sweep's walks compare final losses, so they cannot be wrong for comparing early. The grids' walks compare the running mean at a quarter",
        f"on all validation rows and are judged at rank {TOP} by the validation loss of the evaluation that is handed over. On {draws:,} samples of {SAMPLE} validation rows, the walk chose",
        f"the rate that a comparison of all stored rates chooses in {equal:,}.",
        "",
        "| table | parameters | start | tried | chosen | best | regret (nats) | trainings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in result["walks"]:
        start = ", ".join(f"{rate:g}" for rate in each["start"])
        tried = ", ".join(f"{rate:g}" for rate in each["visited"][2:]) or "–"
        lines.append(
            f"| {each['name']} | {each['parameters'] / 1e9:.3g}B | {start} | then {tried} | {each['chosen']:g} | {each['best']:g} | "
            f"{each['regret']:.4f} | {each['trainings']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    sweep = replay_sweep()
    grids, num_equal, num_draws = replay_grids()
    result = {
        "sweep": summarize(sweep),
        "grids": summarize(grids),
        "together": summarize([*sweep, *grids]),
        "draws": [num_equal, num_draws],
        "walks": [asdict(each) for each in (*sweep, *grids)],
    }
    store_result(result, HERE / "starts.json")
    (HERE / "starts.md").write_text(format_page(result), encoding="utf-8")
    print(json.dumps({name: result[name] for name in ("sweep", "grids", "together", "draws")}, indent=1))


if __name__ == "__main__":
    main()
