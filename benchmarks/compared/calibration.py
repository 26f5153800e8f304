"""Measure how often `compare` is wrong if B is worse by exactly the margin. At most 5% may be called "not worse", and at most 5% "worse".

    python -m benchmarks.compared.calibration [--rounds 4000]     # writes calibration.json

Simulated pairs draw the differences of single examples from distributions with a given mean, with token counts as weights. Real pairs are adapters of
the stored grids (`benchmarks/selection`): the examples of a grid are the population, its mean difference is the truth and the margin, and samples of
them are drawn with replacement. The decision is the same as in the command (`rightrank.decision.comparison.bounds_of_files`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import describe_machine
from benchmarks.results import store_result
from rightrank.decision.comparison import compute_file_bounds
from rightrank.runs.compare import VERDICTS

HERE = Path(__file__).parent
OUT = HERE / "calibration.json"
GRIDS = HERE.parent / "selection"
SIZES = (50, 100, 200, 400)
MARGIN = 0.01
MIN_SHARE = 0.02  # of the deviation between examples; a smaller true difference would be an unrealistic margin
Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Floats]

DIFFERENCES: dict[str, Draw] = {  # with mean 0
    "normal": lambda generator, n: generator.normal(0, 0.1, n),
    "heavy tails": lambda generator, n: 0.05 * generator.standard_t(3, n),
    "skewed upward": lambda generator, n: 0.1 * (generator.exponential(1, n) - 1),
    "skewed downward": lambda generator, n: 0.1 * (1 - generator.exponential(1, n)),
    "few examples differ": lambda generator, n: generator.choice([-1.0, 1.0], n) * (generator.random(n) < 0.1) * 0.3,
}


def count_verdicts(
    draw: Callable[[np.random.Generator], tuple[Floats, Floats, float]], seed: int, rounds: int
) -> dict[str, float]:
    """Return the share of each verdict over repeated draws.

    Args:
        draw: returns differences times weights, the weights and the margin.
    """
    generator = np.random.default_rng(seed)
    counts = {"not_worse": 0, "worse": 0, "cannot_tell": 0}
    for _ in range(rounds):
        sums, weights, margin = draw(generator)
        counts[VERDICTS[compute_file_bounds(sums, weights).is_enough(margin)]] += 1
    return {name: round(count / rounds, 4) for name, count in counts.items()}


def judge_simulated_pairs(rounds: int) -> Iterator[dict[str, Any]]:
    for name, of_kind in DIFFERENCES.items():
        for size in SIZES:

            def draw(
                generator: np.random.Generator, of_kind: Draw = of_kind, size: int = size
            ) -> tuple[Floats, Floats, float]:
                weights = generator.integers(5, 40, size).astype(np.float64)
                return (MARGIN + of_kind(generator, size)) * weights, weights, MARGIN

            yield {"pairs": "simulated", "differences": name, "examples": size, **count_verdicts(draw, size, rounds)}


def read_real_pairs() -> Iterator[tuple[str, Floats, Floats]]:
    """Yield `(name, loss difference of each example, weights)` for every pair of ranks of a grid at the same learning rate and seed."""
    for file in ("real_grids.json", "seeded_grids.json"):
        for curve in json.loads((GRIDS / file).read_text(encoding="utf-8"))["curves"]:
            weights = np.asarray(curve["item_tokens"], dtype=np.float64)
            cells = {
                (rate, seed, int(rank)): np.asarray(losses)
                for rank, by_rate in curve["item_losses"].items()
                for rate, by_seed in by_rate.items()
                for seed, losses in by_seed.items()
            }
            for rate, seed, rank in sorted(cells):
                higher_ranks = [
                    higher_rank for r, s, higher_rank in cells if (r, s) == (rate, seed) and higher_rank > rank
                ]
                for higher_rank in higher_ranks:
                    worse = cells[rate, seed, rank] - cells[rate, seed, higher_rank]
                    worse = worse if worse.sum() > 0 else -worse
                    spread = float(np.std(worse / weights))
                    if worse.sum() / weights.sum() > MIN_SHARE * spread:
                        yield f"{curve['id']} {rank} and {higher_rank} at {rate}, seed {seed}", worse, weights


def judge_real_pairs(rounds: int) -> Iterator[dict[str, Any]]:
    for number, (name, worse, weights) in enumerate(read_real_pairs()):
        truth = float(worse.sum() / weights.sum())
        size = min(200, len(worse))

        def draw(
            generator: np.random.Generator,
            worse: Floats = worse,
            weights: Floats = weights,
            truth: float = truth,
            size: int = size,
        ) -> tuple[Floats, Floats, float]:
            chosen = generator.integers(0, len(worse), size)
            return worse[chosen], weights[chosen], truth

        yield {
            "pairs": "real",
            "pair": name,
            "examples": size,
            "margin": round(truth, 5),
            **count_verdicts(draw, number, rounds),
        }


def summarize(cases: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        pairs: {
            "cases": len(pair_cases),
            "false_not_worse": round(float(np.mean([case["not_worse"] for case in pair_cases])), 4),
            "false_not_worse_highest": max(case["not_worse"] for case in pair_cases),
            "false_worse": round(float(np.mean([case["worse"] for case in pair_cases])), 4),
        }
        for pairs in ("simulated", "real")
        if (pair_cases := [case for case in cases if case["pairs"] == pairs])
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4000)
    rounds = parser.parse_args().rounds
    cases = [*judge_simulated_pairs(rounds), *judge_real_pairs(max(200, rounds // 4))]
    result = {"machine": describe_machine(), "rounds": rounds, "summary": summarize(cases), "cases": cases}
    print(json.dumps(result["summary"], indent=1))
    store_result(result, OUT)


if __name__ == "__main__":
    main()
