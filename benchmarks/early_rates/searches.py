"""Compare ways to spend trainings on the judged grids: the default, fixed rates, a tuned rank 16, random search, TPE and ASHA.

    python -m benchmarks.early_rates.searches [--figure FILE.svg]      # after the judgement; writes searches.json

A value is the test loss of what a search hands over, minus that of rank 16 tuned by four whole trainings. Searches other than the default
choose among ranks 16 and 64 and four learning rates by validation loss. All of them hand over the best evaluation of a
training, of the current factors or of their mean, so that only the choice differs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from benchmarks.early_rates.grids import BASELINE, JUDGED, RATES, TOP
from benchmarks.early_rates.judge import GRIDS, HERE, JUDGED_FILE, SHARE, read_completed, resample, truncate_within
from benchmarks.early_rates.rules import RULE_HANDOVER, GridTable, choose_by_rule
from benchmarks.machine import describe_machine

BUDGETS = (1, 2, 3, 4, 6, 8)
DRAWS = 20
CELLS = tuple((rank, rate) for rank in (BASELINE, TOP) for rate in RATES)
RUNGS = ((0.25, 1), (0.5, 2), (1.0, 4))  # share of the steps, and its number for Optuna

Cell = tuple[int, float]


def measure_test(table: GridTable, cells: Sequence[Cell]) -> float:
    """Return the test loss of the best evaluation of some trainings by validation loss; that of the base where all diverged."""
    best = min((RULE_HANDOVER(table, *cell) for cell in cells), key=table.measure)
    return table.test.get(best, table.base_test)


def hand_over_default(table: GridTable, fraction: float) -> float:
    """Return the test loss of rank 64 at the rate chosen early, truncated within the default margin."""
    full = RULE_HANDOVER(table, TOP, choose_by_rule(table, fraction))
    return table.test[truncate_within(table, full, SHARE)]


def search_randomly(table: GridTable, seed: int) -> Iterator[tuple[float, float]]:
    """Yield cost in trainings and test loss after each of eight trainings in random order."""
    order = [CELLS[index] for index in np.random.default_rng(seed).permutation(len(CELLS))]
    for count in range(1, len(order) + 1):
        yield count, measure_test(table, order[:count])


def search_with_optuna(table: GridTable, seed: int, is_pruned: bool) -> Iterator[tuple[float, float]]:
    """Yield cost and test loss after each trial of TPE, or of random sampling with successive halving. A repeated cell costs nothing."""
    sampler: Any = (
        optuna.samplers.RandomSampler(seed) if is_pruned else optuna.samplers.TPESampler(seed=seed, n_startup_trials=3)
    )
    pruner: Any = (
        optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
        if is_pruned
        else optuna.pruners.NopPruner()
    )
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    paid: dict[Cell, float] = {}
    for _ in range(60):
        trial = study.ask()
        cell = trial.suggest_categorical("rank", (BASELINE, TOP)), trial.suggest_categorical("rate", RATES)
        loss, state = math.inf, optuna.trial.TrialState.COMPLETE
        for fraction, number in RUNGS:
            loss = table.measure(("current", *cell, fraction))
            paid[cell] = max(paid.get(cell, 0.0), fraction)
            if not math.isfinite(loss):
                loss = 1e3
                break
            trial.report(loss, number)
            if fraction < 1 and trial.should_prune():
                state = optuna.trial.TrialState.PRUNED
                break
        study.tell(trial, loss if state == optuna.trial.TrialState.COMPLETE else None, state)
        finished = [tried for tried, share in paid.items() if share == 1]
        if finished:
            yield sum(paid.values()), measure_test(table, finished)


def average_at(paths: Sequence[Sequence[tuple[float, float]]], budget: float) -> float:
    """Return the mean over draws of the test loss at a cost of at most `budget`; a path that has finished nothing by then counts its first result."""
    values = [[loss for cost, loss in path if cost <= budget + 1e-9] or [path[0][1]] for path in paths]
    return float(np.mean([losses[-1] for losses in values]))


def compare_searches(tables: Sequence[GridTable]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, float], list[float]] = {}
    for table in tables:
        tuned = measure_test(table, [(BASELINE, rate) for rate in RATES])

        def add(name: str, cost: float, loss: float, tuned: float = tuned) -> None:
            rows.setdefault((name, cost), []).append(loss - tuned)

        add("default", 1.75, hand_over_default(table, 0.25))
        add("default, rates at an eighth", 1.375, hand_over_default(table, 0.125))
        add("64, tuned", 4, measure_test(table, [(TOP, rate) for rate in RATES]))
        for rank, rate in CELLS:
            add(f"rank {rank} at {rate:g}", 1, measure_test(table, [(rank, rate)]))
        paths = {
            "random search": [list(search_randomly(table, seed)) for seed in range(DRAWS)],
            "TPE": [list(search_with_optuna(table, seed, is_pruned=False)) for seed in range(DRAWS)],
            "ASHA": [list(search_with_optuna(table, seed, is_pruned=True)) for seed in range(DRAWS)],
        }
        for name, draws in paths.items():
            for budget in BUDGETS:
                add(name, budget, average_at(draws, budget))
        print(f"{table.grid.name}: compared", flush=True)
    return [{"search": name, "trainings": cost} | resample(values) for (name, cost), values in rows.items()]


def draw_figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw test loss against cost in trainings, with 95% intervals over grids."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "rightrank", "svg.fonttype": "path", "font.size": 10})
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    axes.axhline(0, color="#888", linewidth=0.8)
    for name, colour in (("random search", "#9a9a9a"), ("TPE", "#c77c11"), ("ASHA", "#7b5ea7")):
        points = [row for row in rows if row["search"] == name]
        axes.plot(
            [row["trainings"] for row in points],
            [row["mean"] for row in points],
            "o-",
            color=colour,
            label=name,
            markersize=4,
        )
    fixed = [row for row in rows if row["search"].startswith(f"rank {BASELINE} at") and row["mean"] < 0.35]
    axes.plot(
        [1] * len(fixed),
        [row["mean"] for row in fixed],
        "_",
        color="#333",
        markersize=14,
        label="rank 16, one fixed rate",
    )
    for row in fixed:
        axes.annotate(
            row["search"].split()[-1],
            (1, row["mean"]),
            (-12, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
        )
    for name, colour, label in (
        ("default", "#0b6e4f", "rightrank select"),
        ("64, tuned", "#3366aa", "rank 64, four whole trainings"),
    ):
        row = next(row for row in rows if row["search"] == name)
        error = [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
        axes.errorbar(row["trainings"], row["mean"], error, fmt="D", color=colour, capsize=3, label=label)
    axes.plot(4, 0, "s", color="#b3123a", label="rank 16, four whole trainings")
    axes.set(xlabel="cost (whole trainings)", ylabel="test loss minus a tuned rank 16 (nats)", xlim=(0.2, 8.3))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", nargs="*", metavar="GRID")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    if options.rehearse is None and not JUDGED_FILE.exists():
        print("searches: the grids are not judged yet: run benchmarks.early_rates.judge first")
        return 2
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    names = options.rehearse or [grid.name for grid in JUDGED if (GRIDS / f"{grid.name}.completed.npz").exists()]
    rows = compare_searches([read_completed(GRIDS / f"{name}.npz") for name in names])
    machine = describe_machine() | {"optuna": importlib.metadata.version("optuna")}
    result = {"machine": machine, "seeds": f"0 to {DRAWS - 1} on each grid", "grids": len(names), "rows": rows}
    if options.rehearse is None:
        (HERE / "searches.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.figure:
        draw_figure(rows, options.figure)
    for row in rows:
        print(f"{row['search']:30} {row['trainings']:5g} {row['mean']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
