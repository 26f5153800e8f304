"""Does the interval of a win rate hold its true value? Simulated prompts and judges, and an oracle judge's decisions.

    python -m benchmarks.judged.coverage [--rounds 2000]       # writes coverage.json

A judgement is a latent preference: the rank's advantage, the prompt's, the judge's, and noise; a tie where it is small. Prompts and judges
are drawn anew in every round. The true win rate, ties as halves, is that over all prompts and judges. `cover` is the share of two-sided 95% intervals that
hold it, `false` that of decisions "enough" at a margin that the true win rate misses exactly: at most 5% are allowed.
With more than three judges each reads half of the prompts.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from benchmarks.machine import machine
from benchmarks.results import store
from rightrank.plugins.judge.judgements import clustered_mean

OUT = Path(__file__).with_name("coverage.json")
PROMPTS, JUDGES, ADVANTAGES, SPREADS = (50, 100, 300), (1, 2, 3, 5, 10), (0.0, -0.5), (0.0, 0.2, 0.4)
OF_PROMPTS, TIE = 0.7, 0.3  # standard deviation of the prompts' part; half the width of a tie
Floats = NDArray[np.float64]


def true_rate(advantage: float, spread: float) -> float:
    """Over all prompts and judges."""
    scale = float(np.sqrt(1 + OF_PROMPTS**2 + spread**2))
    return float(ndtr((advantage - TIE) / scale) + ndtr((advantage + TIE) / scale)) / 2


def draw(
    generator: np.random.Generator, prompts: int, judges: int, advantage: float, spread: float
) -> tuple[list[float], list[int], list[int]]:
    latent = (
        advantage + generator.normal(0, OF_PROMPTS, prompts)[:, None] + generator.normal(0, spread, judges)[None, :]
    )
    latent = latent + generator.normal(0, 1, (prompts, judges))
    scores = np.where(latent > TIE, 1.0, np.where(latent < -TIE, 0.0, 0.5))
    kept = generator.random((prompts, judges)) < (0.5 if judges > 3 else 1.0)
    places = np.nonzero(kept)
    return scores[kept].tolist(), places[0].tolist(), places[1].tolist()


def case(seed: int, prompts: int, judges: int, advantage: float, spread: float, rounds: int) -> dict[str, Any]:
    generator, truth = np.random.default_rng(seed), true_rate(advantage, spread)
    held = false = 0
    width = 0.0
    for _ in range(rounds):
        found = clustered_mean(*draw(generator, prompts, judges, advantage, spread))
        low, high = found.bound(0.025), found.bound(0.975)
        held += low <= truth <= high
        false += found.bound(0.05) > truth
        width += high - low
    return {
        "prompts": prompts,
        "judges": judges,
        "advantage": advantage,
        "judge_spread": spread,
        "win_rate": round(truth, 4),
        "cover": round(held / rounds, 4),
        "false": round(false / rounds, 4),
        "width": round(width / rounds, 4),
    }


def simulate(rounds: int) -> list[dict[str, Any]]:
    """One judge is the population: a spread between judges has no meaning for it."""
    grid = itertools.product(PROMPTS, JUDGES, ADVANTAGES, SPREADS)
    wanted = [one for one in grid if one[1] > 1 or one[3] == 0]
    return [case(seed, *one, rounds) for seed, one in enumerate(wanted)]


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    groups = {"all": cases} | {
        f"{judges} judges": [one for one in cases if one["judges"] == judges] for judges in JUDGES
    }
    return {
        name: {
            "cases": len(found),
            "cover": round(float(np.mean([one["cover"] for one in found])), 4),
            "cover_lowest": min(one["cover"] for one in found),
            "cover_highest": max(one["cover"] for one in found),
            "false": round(float(np.mean([one["false"] for one in found])), 4),
            "false_highest": max(one["false"] for one in found),
        }
        for name, found in groups.items()
        if found
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    rounds = parser.parse_args().rounds
    cases = simulate(rounds)
    result = {"machine": machine(), "rounds": rounds, "summary": summary(cases), "cases": cases}
    print(json.dumps(result["summary"], indent=1))
    store(result, OUT)


if __name__ == "__main__":
    main()
