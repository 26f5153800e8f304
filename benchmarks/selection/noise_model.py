"""Fit a model of the noise of a difference between two ranks to the twelve long grids.

    python -m benchmarks.selection.noise_model  # fits, writes noise_model.json

The variance of the mean difference of n seeds and N examples around that of all seeds and examples, in units of the variance between examples
(`spread`, of one seed), is

    seeds / n  +  crossed / (n·N)  +  examples / N

The three terms are the variance components of three seeds × examples, of each rank against the largest, at the learning rates that are best over
the seeds: averaged over ranks, then grids, then tasks. The degrees of freedom of Student's t maximize the likelihood of the differences that the other
seeds show on the other half of the examples. Every task is also predicted from the fit to the other tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from benchmarks.machine import describe_machine
from benchmarks.selection.tables import GridCurve, read_grids
from rightrank.decision.evidence import NoiseComponents
from rightrank.schema.trials import Floats

HERE = Path(__file__).parent
FILES = ("seeded_grids.json.xz", "grids/*.json.xz", "locked/*.json.xz")
RESULT = HERE / "noise_model.json"
DEGREES = (2.0, 3.0, 4.0, 6.0, 8.0, 15.0, 30.0)


def read_long_grids() -> list[GridCurve]:
    """Read the long grids that have three seeds and example losses."""
    files = [path for pattern in FILES for path in sorted(HERE.glob(pattern))]
    return [curve for file in files for curve in read_grids(file) if curve.items and len(curve.seeds) > 2]


def get_task(name: str) -> str:
    return name.split("_")[0]


def iterate_differences(curve: GridCurve) -> Iterator[Floats]:
    """Yield [seeds, examples] loss differences of each rank from the largest, divided by the mean weight, at the best rates over the seeds."""
    best = {rank: min(curve.cells[rank], key=lambda lr: curve.loss(rank, lr)) for rank in curve.ranks}
    weights = np.asarray(curve.item_tokens or 1.0, dtype=float)
    sign = -1.0 if curve.higher_is_better else 1.0
    top = curve.ranks[-1]
    for rank in curve.ranks[:-1]:
        pairs = [
            (curve.items.get((rank, best[rank], seed)), curve.items.get((top, best[top], seed))) for seed in curve.seeds
        ]
        rows = [np.subtract(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
        if len(rows) > 2:
            yield sign * np.array(rows) / weights.mean()


def estimate_components(rows: Floats) -> NoiseComponents:
    """Estimate the components from the mean squares of two crossed factors."""
    seeds, items = rows.shape
    by_seed, by_item = rows.mean(axis=1), rows.mean(axis=0)
    residuals = rows - by_seed[:, None] - by_item + rows.mean()
    crossed = float((residuals**2).sum()) / ((seeds - 1) * (items - 1))
    examples = float(by_item.var(ddof=1)) - crossed / seeds
    spread = float(rows.var(axis=1, ddof=1).mean())
    return NoiseComponents((float(by_seed.var(ddof=1)) - crossed / items) / spread, crossed / spread, examples / spread)


def average_components(components: Sequence[tuple[str, str, NoiseComponents]]) -> NoiseComponents:
    """Average ranks within grids, grids within tasks, then tasks, with equal weights."""

    def mean(name: str) -> float:
        tasks: dict[str, dict[str, list[float]]] = {}
        for task, grid, component in components:
            tasks.setdefault(task, {}).setdefault(grid, []).append(getattr(component, name))
        return float(
            np.mean([np.mean([np.mean(of_grid) for of_grid in of_task.values()]) for of_task in tasks.values()])
        )

    return NoiseComponents(*(max(mean(name), 0.0) for name in ("seeds", "crossed", "examples")))


def fit_components(curves: Sequence[GridCurve]) -> tuple[NoiseComponents, dict[str, NoiseComponents]]:
    """Return the components fitted to all grids, and for each task those fitted to the other tasks."""
    components = [
        (get_task(curve.name), curve.name, estimate_components(rows))
        for curve in curves
        for rows in iterate_differences(curve)
    ]
    tasks = sorted({task for task, _, _ in components})
    return average_components(components), {
        task: average_components([curve for curve in components if curve[0] != task]) for task in tasks
    }


def compute_log_scores(curves: Sequence[GridCurve], by_task: dict[str, NoiseComponents]) -> dict[str, float]:
    """Map degrees of freedom to the mean log density of the other seeds' differences on the other half, given one seed on one half."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for curve in curves:
        components = by_task[get_task(curve.name)]
        for rows in iterate_differences(curve):
            half = rows.shape[1] // 2
            for seed in range(len(rows)):
                other_seeds = [other_seed for other_seed in range(len(rows)) if other_seed != seed]
                for ours, theirs in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
                    a, b = rows[seed, ours], rows[other_seeds][:, theirs]
                    variance = a.var(ddof=1) * (
                        components.compute_ratio(1, a.size) + components.compute_ratio(len(other_seeds), b.shape[1])
                    )
                    errors.setdefault(get_task(curve.name), []).append(
                        (float(b.mean() - a.mean()), float(variance**0.5))
                    )

    def score(of_task: Sequence[tuple[float, float]], degrees: float) -> float:
        return float(np.mean([student.logpdf(error / scale, degrees) - np.log(scale) for error, scale in of_task]))

    return {
        f"{degrees:g}": float(np.mean([score(task_errors, degrees) for task_errors in errors.values()]))
        for degrees in DEGREES
    }


def main() -> None:
    curves = read_long_grids()
    components, by_task = fit_components(curves)
    scores = compute_log_scores(curves, by_task)
    result = {
        "machine": describe_machine(),
        "grids": [curve.name for curve in curves],
        "parts": list_components(components),
        "parts without a task": {task: list_components(confidence) for task, confidence in by_task.items()},
        "log score by degrees": {name: round(score, 4) for name, score in scores.items()},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("parts", "log score by degrees")}, indent=1))


def list_components(components: NoiseComponents) -> dict[str, float]:
    return {name: round(getattr(components, name), 5) for name in ("seeds", "crossed", "examples")}


if __name__ == "__main__":
    main()
