"""Less noise for the same money, and fewer trainings: what stored grids say of each idea. Nothing is trained.

    python -m benchmarks.selection.savings --out benchmarks/selection/savings.json

noise           the difference of a rank from the top at the top's best learning rate: its standard deviation over seeds, in
                units of what was learned, and its bias. At the end; the mean of half and end; at an eighth, of the current
                weights and of the running means
learning rates  the top rank's learning rate chosen on a part of the training, as it is, by running means, by annealed copies: how
                much worse than the best it ends. And the top's learning rate kept for every lower rank: how much that costs there,
                and how often the whole grid's pick changes
starts          `bracket` with one seed, its walk begun at the smallest truncation that a further seed finds within the margin with a
                probability (at .5: whose mean is within it), or at the rank that it ends with, which no rule can beat: trainings, and
                answers too low and exact against the mean of all seeds. Also of the locked grids, which have judged
stops           a rank that is compared with the top at half is stopped where the probability that it holds at the end is below a
                level: failing ranks that are stopped, and ranks that would have held. The prediction is as in `one_seed.py`, from the
                difference at half, and each family is predicted by the others
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from scipy.optimize import minimize
from scipy.stats import t as student

from benchmarks.machine import machine
from benchmarks.selection import locks
from benchmarks.selection.compare import FAMILIES, HERE, curves_of, whole_grids_of
from benchmarks.selection.replay import judge
from benchmarks.selection.tables import GridCurve, SeedGrid, each_seed_first, read_grids, replay, space_of_grid
from rightrank.schema.trials import Arm
from rightrank.search import bracket
from rightrank.search.history import Space, Trials

USED = ("planted, new", "real, short", "real, 400 steps")
PARTS = (0.125, 0.25, 0.5)
LEVELS = (0.02, 0.05, 0.1)
STARTS = (0.5, 0.7, 0.9, 0.95, 0.98)
DEGREES = 2.0
FLOOR = 1e-3  # of what was learned: no difference is smaller


def losses(curve: GridCurve, cells: SeedGrid, rank: int, rate: float) -> dict[int, float]:
    """By seed, lower is better."""
    sign = -1.0 if curve.higher_is_better else 1.0
    return {seed: sign * value for seed, value in cells.get(rank, {}).get(rate, {}).items()}


def best_rate(curve: GridCurve, cells: SeedGrid, rank: int, seed: int) -> float | None:
    """The learning rate with the lowest loss of this seed."""
    known = {rate: found for rate in cells.get(rank, {}) if (found := losses(curve, cells, rank, rate).get(seed)) is not None}  # fmt: skip
    return min(known, key=lambda rate: (known[rate], rate), default=None)


def top_rate(curve: GridCurve) -> float:
    return min(curve.cells[curve.ranks[-1]], key=lambda rate: curve.loss(curve.ranks[-1], rate))


def learned(curve: GridCurve) -> float:
    assert curve.base is not None
    best = min(curve.best(rank) for rank in curve.ranks)
    return (-curve.base if curve.higher_is_better else curve.base) - best


def differences(curve: GridCurve, cells: SeedGrid, rank: int) -> dict[int, float]:
    """By seed: how much worse than the top at the top's best learning rate."""
    rate = top_rate(curve)
    ours, tops = losses(curve, cells, rank, rate), losses(curve, cells, curve.ranks[-1], rate)
    return {seed: ours[seed] - tops[seed] for seed in ours.keys() & tops.keys()}


def noise(curves: Sequence[GridCurve]) -> dict[str, Any]:
    """Over all ranks below the top: the median standard deviation over seeds, and the median absolute bias from the end's mean."""
    table: dict[str, list[tuple[float, float]]] = {}
    for curve in curves:
        unit = learned(curve)
        if unit <= 0:
            continue
        for rank in curve.ranks[:-1]:
            end = differences(curve, curve.cells, rank)
            half = differences(curve, curve.checkpoints.get(0.5, {}), rank)
            ways = {
                "end": end,
                "half": half,
                "mean of half and end": {s: (half[s] + end[s]) / 2 for s in half if s in end},
            }
            ways["an eighth"] = (
                differences(curve, curve.checkpoints.get(0.125, {}), rank) if curve.metric == "loss" else {}
            )
            ways["an eighth, running means"] = differences(curve, curve.averaged.get(0.125, {}), rank) if curve.metric == "loss" else {}  # fmt: skip
            for name, found in ways.items():
                if len(found) > 1 and len(end) > 1:
                    values = np.array(list(found.values())) / unit
                    bias = abs(values.mean() - np.mean(list(end.values())) / unit)
                    table.setdefault(name, []).append((float(values.std(ddof=1)), float(bias)))
    return {
        name: {
            "cases": len(rows),
            "deviation over seeds": round(float(np.median([row[0] for row in rows])), 4),
            "bias": round(float(np.median([row[1] for row in rows])), 4),
        }
        for name, rows in table.items()
    }


def learning_rates(curves: Sequence[GridCurve], margin: float) -> dict[str, Any]:
    """Regret at the end of the top's learning rate chosen on a part; and of the top's learning rate at the lower ranks."""
    chosen: dict[str, list[float]] = {}
    kept: list[float] = []
    picks = {"the same": 0, "larger": 0, "smaller": 0}
    for curve in curves:
        top = curve.ranks[-1]
        ways: dict[str, SeedGrid] = {f"{part:g}": (curve.losses or curve.checkpoints).get(part, {}) for part in PARTS}
        ways |= {
            "0.125, running means": curve.averaged.get(0.125, {}),
            "0.125, annealed": curve.annealed.get(0.125, {}),
        }
        for seed in curve.seeds:
            best = best_rate(curve, curve.cells, top, seed)
            if best is None:
                continue
            for name, cells in ways.items():
                is_loss = name not in ("0.25", "0.5", "0.125") or bool(curve.losses)
                rate = best_loss_rate(cells, top, seed) if is_loss else best_rate(curve, cells, top, seed)
                ends = losses(curve, curve.cells, top, rate).get(seed) if rate is not None else None
                if ends is not None:
                    chosen.setdefault(name, []).append(ends - losses(curve, curve.cells, top, best)[seed])
            own = {rank: min(found) for rank in curve.ranks if (found := at_every_rate(curve, rank, seed))}
            one = {rank: found for rank in curve.ranks if (found := losses(curve, curve.cells, rank, best).get(seed)) is not None}  # fmt: skip
            kept += [one[rank] - own[rank] for rank in curve.ranks[:-1] if rank in one]
            before, after = smallest_within(own, margin), smallest_within(one, margin)
            picks["the same" if after == before else "larger" if after > before else "smaller"] += 1
    return {
        "chosen on a part": {name: regret_row(rows, margin) for name, rows in chosen.items()},
        "the top's at lower ranks": regret_row(kept, margin) | {"pick": picks},
    }


def best_loss_rate(cells: SeedGrid, rank: int, seed: int) -> float | None:
    """By losses, whatever the metric."""
    known = {rate: by_seed[seed] for rate, by_seed in cells.get(rank, {}).items() if seed in by_seed}
    return min(known, key=lambda rate: (known[rate], rate), default=None)


def at_every_rate(curve: GridCurve, rank: int, seed: int) -> list[float]:
    rates = curve.cells.get(rank, {})
    return [found for rate in rates if (found := losses(curve, curve.cells, rank, rate).get(seed)) is not None]


def smallest_within(by_rank: Mapping[int, float], margin: float) -> int:
    best = min(by_rank.values())
    return min(rank for rank, loss in by_rank.items() if loss <= best + margin + 1e-9)


def regret_row(rows: Sequence[float], margin: float) -> dict[str, Any]:
    values = np.array(rows)
    return {
        "cases": len(rows),
        "the best": int((values <= 1e-9).sum()),
        "within a margin": int((values <= margin + 1e-9).sum()),
        "mean regret": round(float(values.mean()), 5),
        "worst": round(float(values.max()), 4),
    }


@dataclass(frozen=True)
class Half:
    """A rank against the top, at half and at the end of one seed, each at its best learning rate at the end."""

    family: str
    unit: float  # what was learned
    half: float
    end: float


def halves(family: str, curves: Sequence[GridCurve]) -> Iterator[Half]:
    for curve in curves:
        cells, unit = curve.checkpoints.get(0.5, {}), learned(curve)
        for seed in curve.seeds if unit > 0 else ():
            top = best_rate(curve, curve.cells, curve.ranks[-1], seed)
            for rank in curve.ranks[:-1]:
                rate = best_rate(curve, curve.cells, rank, seed)
                if rate is None or top is None:
                    continue
                pairs = [
                    (losses(curve, grid, rank, rate).get(seed), losses(curve, grid, curve.ranks[-1], top).get(seed))
                    for grid in (cells, curve.cells)
                ]
                if all(one is not None and other is not None for one, other in pairs):
                    half, end = (one - other for one, other in pairs if one is not None and other is not None)
                    yield Half(family, unit, half, end)


def scale(case: Half, parameters: np.ndarray) -> float:
    """σ = c · |difference at half|^a · learned^(1 - a)."""
    seen = max(abs(case.half), FLOOR * case.unit)
    return math.exp(parameters[0] + parameters[1] * math.log(seen) + (1 - parameters[1]) * math.log(case.unit))


def fit(cases: Sequence[Half]) -> np.ndarray:
    """[c, a, slope]: the end is slope · half + σ t, every family with the same weight."""
    counts = {family: sum(case.family == family for case in cases) for family in {case.family for case in cases}}

    def loss(parameters: np.ndarray) -> float:
        total = 0.0
        for case in cases:
            sigma = scale(case, parameters)
            density = student.logpdf((case.end - parameters[2] * case.half) / sigma, DEGREES) - math.log(
                sigma / case.unit
            )
            total -= float(density) / counts[case.family]
        return total

    return minimize(loss, np.array([-2.0, 0.7, 1.0]), method="Nelder-Mead", options={"maxiter": 120}).x


def stops(every: Sequence[Half], families: Sequence[str] = USED) -> dict[str, Any]:
    """Each of `families` is predicted by what the others of `every` fit."""
    found: dict[str, Any] = {}
    for family in families:
        parameters = fit([case for case in every if case.family != family][::3])
        own = [case for case in every if case.family == family]
        for margin in FAMILIES[family][2]:
            fails = sum(case.end > margin for case in own)
            row: dict[str, Any] = {"cases": len(own), "failing": fails}
            for level in LEVELS:
                stopped = [
                    case
                    for case in own
                    if student.cdf((margin - parameters[2] * case.half) / scale(case, parameters), DEGREES) < level
                ]
                wrong = sum(case.end <= margin for case in stopped)
                row[f"below {level:g}"] = {"stopped": len(stopped), "of these would have held": wrong}
            found[f"{family}, {margin:g}"] = row
    return found


class StartedAt(bracket.Bracket):
    """`bracket` with a walk that begins at a given rank."""

    def __init__(self, space: Space, rank: int) -> None:
        super().__init__(space)
        self._rank = rank

    def start(self, trials: Trials, learning_rate: float) -> Generator[Sequence[Arm], None, int]:
        yield from ()
        return self._rank


def starts(curves: Sequence[GridCurve], margins: Sequence[float]) -> dict[str, Any]:
    """By probability, and for the best start: mean trainings, and answers too low and exact."""
    found: dict[str, Any] = {}
    for name in (*STARTS, "the answer"):
        judged = []
        for curve, margin in product(curves, margins):
            space = space_of_grid(curve, margin)
            if isinstance(name, float):
                with patch.object(bracket, "START_PROBABILITY", name):
                    done = replay(curve, bracket.Bracket, space)
            else:
                answer = replay(curve, bracket.Bracket, space).answer.rank or space.top
                begun = space.ranks[-2] if answer == space.top else answer
                done = replay(curve, lambda space, begun=begun: StartedAt(space, begun), space)
            judged.append(judge(curve, margin, done.answer.rank, done.answer.learning_rate, done.trainings))
        found[str(name)] = {
            "cases": len(judged),
            "trainings": round(float(np.mean([one.trainings for one in judged])), 3),
            "too low": sum(one.under for one in judged),
            "exact": sum(one.exact for one in judged),
        }
    return found


def locked_curves() -> list[GridCurve]:
    curves = [curve for file in locks.files() for curve in read_grids(file)]
    return [turned for curve in curves for turned in each_seed_first(curve)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "savings.json")
    options = parser.parse_args()
    families = {family: whole_grids_of(family) for family in USED}
    result: dict[str, Any] = {
        "machine": machine(),
        "noise": {family: noise(curves) for family, curves in families.items()},
        "learning rates": {
            f"{family}, {margin:g}": learning_rates(curves, margin)
            for family, curves in families.items()
            for margin in FAMILIES[family][2][1:2]
        },
        "starts": {family: starts(curves_of(family), FAMILIES[family][2]) for family in USED}
        | {"locked": starts(locked_curves(), FAMILIES["real, 400 steps"][2])},
        "stops": stops([case for family, curves in families.items() for case in halves(family, curves)]),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=1))


if __name__ == "__main__":
    main()
