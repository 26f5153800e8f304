"""Read the grids of losses that were stored before, so that the same policies can be rehearsed on them.

They have three or six seeds, ranks 1, 4, 16 and 64 and one to three learning rates. Some lack values, which are replaced as follows:

- The wide grids have no test losses of truncations: the whole adapter's test loss plus the paired difference on the validation split stands for them.
- The wide grids have only means along a training: a learning rate is then chosen without the rule on one standard error.
- No grid has an average of seeds or a training of twice the steps.
"""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning_rate.policies import Floats, Key, Measured, SeedTable

FOLDERS = ("grids", "locked", "wide")
MIN_STEPS = 400


def read_stored(selection: Path) -> list[SeedTable]:
    """Return a table for each seed of each grid of losses in the folder of the earlier study."""
    tables: list[SeedTable] = []
    for path in sorted(path for folder in FOLDERS for path in (selection / folder).glob("*.json.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as file:
            curves = json.load(file)["curves"]
        for curve in curves:
            if curve["metric"] == "loss" and curve["steps"] >= MIN_STEPS:
                tables += [
                    read_seed(path.with_name(path.name.removesuffix(".json.xz")), curve, seed)
                    for seed in curve["seeds"]
                ]
    if not tables:
        raise SystemExit(
            f"{selection}: no stored grids (*.json.xz) in its folders {', '.join(FOLDERS)}: give the folder of the earlier study"
        )
    return tables


def iterate_cells(grid: Mapping[str, Any], seed: int) -> Iterator[tuple[int, float, Any]]:
    """Yield rank, learning rate and value of one seed."""
    for rank, by_rate in grid.items():
        for rate, by_seed in by_rate.items():
            if str(seed) in by_seed:
                yield int(rank), float(rate), by_seed[str(seed)]


def read_seed(path: Path, curve: Mapping[str, Any], seed: int) -> SeedTable:
    """Return the table of a seed; a training that the file lacks, but has with another seed, diverged."""
    weights = np.array(curve["item_tokens"], dtype=float)
    items = {(rank, rate): np.array(values) for rank, rate, values in iterate_cells(curve["item_losses"], seed)}
    tests, test_weights = read_tests(path, curve, seed)
    adapters: dict[Key, Measured] = {}
    for (rank, rate), losses in items.items():
        mean = float(losses.sum() / weights.sum())
        adapters[Key("trained", rank, rate)] = Measured(losses, mean, None, tests["trained", rank, rate])
    for rank, by_rate in curve["item_losses"].items():
        for rate in (rate for rate in map(float, by_rate) if (int(rank), rate) not in items):
            adapters[Key("trained", int(rank), rate)] = Measured(None, math.inf, None, math.inf)
    early_items = curve.get("checkpoint_items", {})
    for fraction, grid in curve["checkpoints"].items():
        by_cell = {
            (rank, rate): np.array(values) for rank, rate, values in iterate_cells(early_items.get(fraction, {}), seed)
        }
        for rank, rate, value in iterate_cells(grid, seed):
            losses_then = by_cell.get((rank, rate))
            adapters[Key("trained", rank, rate, float(fraction))] = Measured(losses_then, float(value), None, math.nan)
    top = max(rank for rank, _ in items)
    for rank, rate, values in iterate_cells(curve["truncation_items"], seed):
        losses = np.array(values)
        mean = float(losses.sum() / weights.sum())
        full_adapter = adapters.get(Key("trained", top, rate))
        if full_adapter is not None:
            test = tests.get(("truncated", rank, rate), full_adapter.test_mean + mean - full_adapter.validation_mean)
            adapters[Key("truncated", rank, rate)] = Measured(losses, mean, None, test)
    return SeedTable(
        path.name, seed, adapters, weights, np.arange(len(weights)), test_weights, np.arange(len(test_weights))
    )


def read_tests(path: Path, curve: Mapping[str, Any], seed: int) -> tuple[dict[tuple[str, int, float], float], Floats]:
    """Return the mean test losses by kind, rank and learning rate, and the weights of the test examples where they are stored."""
    if "test_grids" in curve:
        grids = curve["test_grids"]
        means = {
            (kind, rank, rate): float(value)
            for kind in ("trained", "truncated")
            for rank, rate, value in iterate_cells(grids[kind], seed)
        }
        return means, np.ones(0)
    with np.load(path.with_suffix(".npz")) as arrays:
        cells, losses, weights = arrays["cells"].tolist(), arrays["losses"] / 1000, arrays["tokens"].astype(float)
    of_seed = [(cell, row) for cell, row in zip(cells, losses, strict=True) if int(cell[2]) == seed]
    return {
        ("trained", int(cell[0]), float(cell[1])): float(row.sum() / weights.sum()) for cell, row in of_seed
    }, weights
