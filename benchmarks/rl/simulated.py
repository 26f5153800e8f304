"""How often the profile `rl` answers with too little rank, in made-up grids whose truth is known.

    python -m benchmarks.rl.simulated        # writes simulated.json, about two minutes

Ranks 1, 4 and 16, three learning rates (the middle one is the best, by three points), 300 prompts whose ease all runs share, and
a seed noise for each run. Rank 1 is truly worse than the others by `gap`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rl.replay import MARGIN, Grid, Run, replay
from rightrank.schema.trials import EvalPoint

RESULTS = Path(__file__).with_name("simulated.json")
RANKS, LEARNING_RATES, PROMPTS = (1, 4, 16), (1e-5, 3e-5, 1e-4), 300
GAPS, NOISES, SEEDS = (0.0, 0.02, 0.05, 0.1), (0.005, 0.02), (3,)
BLUR = 0.15  # how far the ease of a prompt varies between runs


def make_grid(gap: float, noise: float, seeds: int, generator: np.random.Generator) -> Grid:
    ease = generator.uniform(size=PROMPTS)
    grid: Grid = {}
    for rank in RANKS:
        for learning_rate in LEARNING_RATES:
            for seed in range(seeds):
                level = 0.6 - gap * (rank == 1) - 0.03 * (learning_rate != LEARNING_RATES[1])
                met = ease + generator.normal(0, BLUR, PROMPTS) < level + generator.normal(0, noise)
                points = (EvalPoint(step=0, value=0.2), EvalPoint(step=100, value=level))
                test = tuple(met.astype(float).tolist())
                grid[rank, learning_rate, seed] = Run(rank, learning_rate, seed, points, test)
    return grid


def study(gap: float, noise: float, seeds: int, draws: int) -> dict[str, Any]:
    generator = np.random.default_rng(round(1e6 * gap + 1e4 * noise + seeds))
    ranks, verdicts, trainings = Counter[str](), Counter[str](), 0
    for _ in range(draws):
        found = replay(make_grid(gap, noise, seeds, generator), LEARNING_RATES, range(seeds))
        assert found.decision is not None
        ranks[str(found.decision.rank)] += 1
        verdicts[found.decision.verdict] += 1
        trainings += found.trainings
    return {
        "gap": gap,
        "seed noise": noise,
        "seeds given": seeds,
        "draws": draws,
        "ranks": dict(sorted(ranks.items())),
        "verdicts": dict(sorted(verdicts.items())),
        "trainings": round(trainings / draws, 1),
        "of the whole grid": len(RANKS) * len(LEARNING_RATES) * seeds,
    }


def main(draws: int = 50) -> None:
    found = [study(gap, noise, seeds, draws) for gap in GAPS for noise in NOISES for seeds in SEEDS]
    for one in found:
        print(json.dumps(one))
    stored = {"margin": MARGIN, "prompts": PROMPTS, "worlds": found}
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
