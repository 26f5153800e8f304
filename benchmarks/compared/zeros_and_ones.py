"""Measure how often the bounds of a metric of zeros and ones are wrong if B is worse by exactly the margin. At most 5% each way are allowed.

    python -m benchmarks.compared.zeros_and_ones     # writes zeros_and_ones.json

Answers get worse in a share of the examples and better in another, for 36 to 400 examples. The score test of `compare` is measured together with its
bounds for other metrics, and with those of `select` with and without the rule of three (`rightrank.decision.comparison`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compared.calibration import Floats
from benchmarks.machine import describe_machine
from benchmarks.results import store_result
from rightrank.decision.comparison import (
    Bounds,
    compute_bounds,
    compute_file_bounds,
    estimate_file_difference,
    estimate_mean,
)

OUT = Path(__file__).parent / "zeros_and_ones.json"
ROUNDS = 4000
SIZES = (36, 50, 100, 200, 400)
WORSE = (0.04, 0.1, 0.2, 0.3)  # share of examples
BETTER = (0.0, 0.25, 0.5)  # share that gets better, relative to the share that gets worse

METHODS: dict[str, Callable[[Floats, Floats], Bounds]] = {
    "score test": lambda sums, weights: compute_file_bounds(sums, weights, 1.0),
    "kurtosis": lambda sums, weights: compute_bounds(estimate_file_difference(sums, weights)),
    "crossed factors": lambda sums, weights: compute_bounds(estimate_mean(sums[None, :], weights)),
    "crossed factors, rule of three": lambda sums, weights: compute_bounds(estimate_mean(sums[None, :], weights, 1.0)),
}


def compute_error_rates(method: str, examples: int, worse: float, better: float) -> tuple[float, float]:
    """Return `(share of false "not worse", share of false "worse")`."""
    generator = np.random.default_rng([examples, round(100 * worse), round(1000 * better)])
    drawn = generator.multinomial(examples, [worse, better, 1 - worse - better], size=ROUNDS)[:, :2]
    counts: dict[bool | None, int] = {True: 0, False: 0, None: 0}
    for (up, down), count in zip(*np.unique(drawn, axis=0, return_counts=True), strict=True):
        sums = np.concatenate([np.ones(up), -np.ones(down), np.zeros(examples - up - down)])
        counts[METHODS[method](sums, np.ones(examples)).is_enough(worse - better)] += int(count)
    return counts[True] / ROUNDS, counts[False] / ROUNDS


def main() -> None:
    summary: dict[str, Any] = {}
    for method in METHODS:
        cases = [
            compute_error_rates(method, size, worse, worse * better)
            for size, worse, better in product(SIZES, WORSE, BETTER)
        ]
        (not_worse, wrong), highest = np.mean(cases, axis=0), np.max(cases, axis=0)
        summary[method] = {
            "false_not_worse": round(float(not_worse), 4),
            "false_not_worse_highest": round(float(highest[0]), 4),
            "false_worse": round(float(wrong), 4),
        }
        print(f"{method:32} {summary[method]}")
    store_result({"machine": describe_machine(), "rounds": ROUNDS, "cases": 60, "summary": summary}, OUT)


if __name__ == "__main__":
    main()
