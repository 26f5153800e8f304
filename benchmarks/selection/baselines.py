"""What people do instead, on the same grids: each gets what the strategy under test spent on the grid, or more.

Every baseline but `argmin of one rate` and the stopping schedulers' own best picks as generously as ours: the smallest
rank within the margin of the best that it saw. Stochastic ones are repeated over seeds.

ASHA is run twice: as Optuna's `SuccessiveHalvingPruner`, halving, and as Ray Tune's own scheduler as it comes (`ray_asha.py`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.selection.tables import GridCurve


@dataclass(frozen=True)
class Pick:
    """A rank, the learning rate it would be trained at, and what it cost in whole trainings."""

    rank: int | None
    learning_rate: float | None
    trainings: float


Baseline = Callable[[GridCurve, float, float, np.random.Generator], Pick]
Seen = dict[tuple[int, float], float]  # (rank, learning rate) → loss of the first seed


def seen_loss(curve: GridCurve, rank: int, learning_rate: float) -> float | None:
    """What one training shows: the first seed's value, lower is better."""
    by_seed = curve.cells.get(rank, {}).get(learning_rate)
    if not by_seed:
        return None
    value = by_seed[min(by_seed)]
    return -value if curve.higher_is_better else value


def seen_early(curve: GridCurve, part: float, rank: int, learning_rate: float) -> float | None:
    by_seed = curve.checkpoints.get(part, {}).get(rank, {}).get(learning_rate)
    if not by_seed:
        return None
    value = by_seed[min(by_seed)]
    return -value if curve.higher_is_better else value


def smallest_within(seen: Seen, margin: float) -> tuple[int | None, float | None]:
    """The smallest rank seen within the margin of the best seen, and its best rate."""
    if not seen:
        return None, None
    best = min(seen.values())
    rank = min(rank for (rank, _), loss in seen.items() if loss - best <= margin + 1e-9)
    return rank, min(
        (learning_rate for r, learning_rate in seen if r == rank), key=lambda learning_rate: seen[rank, learning_rate]
    )


def train(curve: GridCurve, cells: list[tuple[int, float]]) -> Seen:
    losses = {cell: seen_loss(curve, *cell) for cell in cells}
    return {cell: loss for cell, loss in losses.items() if loss is not None}


def nearest(values: list[int] | list[float], wanted: float) -> int | float:
    return min(values, key=lambda value: (abs(math.log(value / wanted)), value))


def always_16(curve: GridCurve, margin: float, budget: float, generator: np.random.Generator) -> Pick:
    """Rank 16 (the nearest there is), its learning rate tuned over the whole ladder."""
    rank = int(nearest(curve.ranks, 16))
    seen = train(curve, [(rank, learning_rate) for learning_rate in curve.learning_rates])
    return Pick(rank, min(seen, key=lambda cell: seen[cell])[1], len(seen))


def argmin_of_one_rate(curve: GridCurve, margin: float, budget: float, generator: np.random.Generator) -> Pick:
    """Every rank once at the upper middle learning rate; the best wins."""
    learning_rate = curve.learning_rates[len(curve.learning_rates) // 2]
    seen = train(curve, [(rank, learning_rate) for rank in curve.ranks])
    return Pick(min(seen, key=lambda cell: seen[cell])[0], learning_rate, len(seen))


def four_points_at_the_default_rate(
    curve: GridCurve, margin: float, budget: float, generator: np.random.Generator
) -> Pick:
    """Up to four ranks, spread over the range, at the learning rate nearest to 1e-4."""
    learning_rate = float(nearest(curve.learning_rates, 1e-4))
    places = np.unique(np.linspace(0, len(curve.ranks) - 1, min(4, len(curve.ranks))).round().astype(int))
    seen = train(curve, [(curve.ranks[place], learning_rate) for place in places])
    rank, _ = smallest_within(seen, margin)
    return Pick(rank, learning_rate, len(seen))


def random_search(curve: GridCurve, margin: float, budget: float, generator: np.random.Generator) -> Pick:
    """Cells drawn without repeats until the budget is spent."""
    cells = [(rank, learning_rate) for rank in curve.ranks for learning_rate in curve.cells[rank]]
    chosen = [cells[i] for i in generator.permutation(len(cells))[: max(1, math.ceil(budget))]]
    seen = train(curve, chosen)
    return Pick(*smallest_within(seen, margin), len(seen))


def kneedle(curve: GridCurve, margin: float, budget: float, generator: np.random.Generator) -> Pick:
    """Every rank once at the upper middle learning rate; the knee over log rank (kneed); the top where there is none."""
    from kneed import KneeLocator

    learning_rate = curve.learning_rates[len(curve.learning_rates) // 2]
    seen = train(curve, [(rank, learning_rate) for rank in curve.ranks])
    ranks = sorted(rank for rank, _ in seen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = KneeLocator(
            [math.log2(rank) for rank in ranks],
            [seen[rank, learning_rate] for rank in ranks],
            curve="convex",
            direction="decreasing",
        ).knee
    rank = ranks[-1] if found is None else round(2 ** float(found))
    return Pick(rank, learning_rate, len(seen))


def energy_95(curve: GridCurve, margin: float, budget: float, generator: np.random.Generator) -> Pick:
    """The learning rate ladder at the top rank; the smallest rank that holds 95% of that adapter's squared singular values."""
    top = curve.ranks[-1]
    seen = train(curve, [(top, learning_rate) for learning_rate in curve.learning_rates])
    learning_rate = min(seen, key=lambda cell: seen[cell])[1]
    shares = curve.energy.get(learning_rate, {}).get(0)
    if shares is None:
        return Pick(None, None, len(seen))
    held = np.cumsum(shares)
    needed = int(np.searchsorted(held, 0.95 * held[-1])) + 1
    return Pick(next((rank for rank in curve.ranks if rank >= needed), top), learning_rate, len(seen))


def optuna_tpe_median(curve: GridCurve, margin: float, budget: float, generator: np.random.Generator) -> Pick:
    import optuna

    return _optuna(curve, margin, budget, generator, optuna.pruners.MedianPruner(n_startup_trials=3), tpe=True)


def asha(curve: GridCurve, margin: float, budget: float, generator: np.random.Generator) -> Pick:
    import optuna

    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    return _optuna(curve, margin, budget, generator, pruner, tpe=False)


def _optuna(
    curve: GridCurve, margin: float, budget: float, generator: np.random.Generator, pruner: object, *, tpe: bool
) -> Pick:
    """Optuna over rank × learning rate, reporting at the checkpoints that the grid has; a cell seen before costs nothing."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = int(generator.integers(2**31))
    sampler = (
        optuna.samplers.TPESampler(seed=seed, n_startup_trials=4) if tpe else optuna.samplers.RandomSampler(seed=seed)
    )
    study = optuna.create_study(sampler=sampler, pruner=pruner)  # type: ignore[arg-type]
    parts = sorted(curve.checkpoints)
    seen: Seen = {}
    paid: dict[tuple[int, float], float] = {}
    for _ in range(20 * curve.size):
        if sum(paid.values()) >= budget:
            break
        trial = study.ask()
        rank = trial.suggest_categorical("rank", curve.ranks)
        learning_rate = trial.suggest_categorical("learning_rate", curve.learning_rates)
        final = seen_loss(curve, rank, learning_rate)
        if final is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        pruned = False
        for number, part in enumerate(parts, start=1):
            early = seen_early(curve, part, rank, learning_rate)
            if early is None:
                continue
            trial.report(early, number)
            paid[rank, learning_rate] = max(paid.get((rank, learning_rate), 0.0), part)
            if trial.should_prune():
                pruned = True
                break
        if pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        paid[rank, learning_rate] = 1.0
        seen[rank, learning_rate] = final
        study.tell(trial, final)
    return Pick(*smallest_within(seen, margin), sum(paid.values()))


DETERMINISTIC: dict[str, Baseline] = {
    "always 16, rate tuned": always_16,
    "argmin of one rate": argmin_of_one_rate,
    "four points, default rate": four_points_at_the_default_rate,
    "Kneedle": kneedle,
    "95% energy of the top": energy_95,
}
STOCHASTIC: dict[str, Baseline] = {
    "random search": random_search,
    "Optuna TPE + median": optuna_tpe_median,
    "ASHA (Optuna)": asha,
}
