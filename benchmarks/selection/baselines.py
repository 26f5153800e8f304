"""Run common alternatives on the same grids. Each may spend at least what the strategy under test spent on the grid.

Every baseline except `argmin of one rate` and the schedulers' own best picks as generously as ours: the smallest
observed rank within the margin of the best. Stochastic ones are repeated over seeds.

ASHA is run twice: as Optuna's `SuccessiveHalvingPruner`, halving, and as Ray Tune's own scheduler at its defaults (`ray_asha.py`).
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
    """A rank, the learning rate it would be trained at, and its cost in full trainings."""

    rank: int | None
    learning_rate: float | None
    trainings: float


Baseline = Callable[[GridCurve, float, float, np.random.Generator], Pick]
Losses = dict[tuple[int, float], float]  # (rank, learning rate) → loss of the first seed


def get_first_loss(curve: GridCurve, rank: int, learning_rate: float) -> float | None:
    """Return the first seed's value, oriented so that lower is better."""
    by_seed = curve.cells.get(rank, {}).get(learning_rate)
    if not by_seed:
        return None
    value = by_seed[min(by_seed)]
    return -value if curve.higher_is_better else value


def get_early_loss(curve: GridCurve, fraction: float, rank: int, learning_rate: float) -> float | None:
    by_seed = curve.checkpoints.get(fraction, {}).get(rank, {}).get(learning_rate)
    if not by_seed:
        return None
    value = by_seed[min(by_seed)]
    return -value if curve.higher_is_better else value


def find_smallest_within(losses: Losses, margin: float) -> tuple[int | None, float | None]:
    """Return the smallest observed rank within the margin of the best, and its best rate."""
    if not losses:
        return None, None
    best = min(losses.values())
    rank = min(rank for (rank, _), loss in losses.items() if loss - best <= margin + 1e-9)
    return rank, min(
        (learning_rate for r, learning_rate in losses if r == rank),
        key=lambda learning_rate: losses[rank, learning_rate],
    )


def train(curve: GridCurve, cells: list[tuple[int, float]]) -> Losses:
    losses = {cell: get_first_loss(curve, *cell) for cell in cells}
    return {cell: loss for cell, loss in losses.items() if loss is not None}


def find_nearest(values: list[int] | list[float], target: float) -> int | float:
    return min(values, key=lambda value: (abs(math.log(value / target)), value))


def pick_rank_16(curve: GridCurve, margin: float, budget: float, generator: np.random.Generator) -> Pick:
    """Tune the learning rate of rank 16 (or the nearest rank) over all rates."""
    rank = int(find_nearest(curve.ranks, 16))
    losses = train(curve, [(rank, learning_rate) for learning_rate in curve.learning_rates])
    return Pick(rank, min(losses, key=lambda cell: losses[cell])[1], len(losses))


def pick_best_at_one_rate(curve: GridCurve, margin: float, budget: float, generator: np.random.Generator) -> Pick:
    """Train every rank once at the upper middle learning rate, and pick the best."""
    learning_rate = curve.learning_rates[len(curve.learning_rates) // 2]
    losses = train(curve, [(rank, learning_rate) for rank in curve.ranks])
    return Pick(min(losses, key=lambda cell: losses[cell])[0], learning_rate, len(losses))


def pick_from_four_points(curve: GridCurve, margin: float, budget: float, generator: np.random.Generator) -> Pick:
    """Train up to four ranks, spread over the range, at the learning rate nearest to 1e-4."""
    learning_rate = float(find_nearest(curve.learning_rates, 1e-4))
    indices = np.unique(np.linspace(0, len(curve.ranks) - 1, min(4, len(curve.ranks))).round().astype(int))
    losses = train(curve, [(curve.ranks[index], learning_rate) for index in indices])
    rank, _ = find_smallest_within(losses, margin)
    return Pick(rank, learning_rate, len(losses))


def search_randomly(curve: GridCurve, margin: float, budget: float, generator: np.random.Generator) -> Pick:
    """Train random cells without repeats until the budget is spent."""
    cells = [(rank, learning_rate) for rank in curve.ranks for learning_rate in curve.cells[rank]]
    chosen = [cells[i] for i in generator.permutation(len(cells))[: max(1, math.ceil(budget))]]
    losses = train(curve, chosen)
    return Pick(*find_smallest_within(losses, margin), len(losses))


def pick_knee(curve: GridCurve, margin: float, budget: float, generator: np.random.Generator) -> Pick:
    """Train every rank once at the upper middle learning rate, and pick the knee over log rank (kneed), or the highest rank without a knee."""
    from kneed import KneeLocator

    learning_rate = curve.learning_rates[len(curve.learning_rates) // 2]
    losses = train(curve, [(rank, learning_rate) for rank in curve.ranks])
    ranks = sorted(rank for rank, _ in losses)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        knee = KneeLocator(
            [math.log2(rank) for rank in ranks],
            [losses[rank, learning_rate] for rank in ranks],
            curve="convex",
            direction="decreasing",
        ).knee
    rank = ranks[-1] if knee is None else round(2 ** float(knee))
    return Pick(rank, learning_rate, len(losses))


def pick_by_energy(curve: GridCurve, margin: float, budget: float, generator: np.random.Generator) -> Pick:
    """Tune the learning rate at the highest rank, and pick the smallest rank with 95% of that adapter's squared singular values."""
    top = curve.ranks[-1]
    losses = train(curve, [(top, learning_rate) for learning_rate in curve.learning_rates])
    learning_rate = min(losses, key=lambda cell: losses[cell])[1]
    shares = curve.energy.get(learning_rate, {}).get(0)
    if shares is None:
        return Pick(None, None, len(losses))
    cumulative_energy = np.cumsum(shares)
    needed = int(np.searchsorted(cumulative_energy, 0.95 * cumulative_energy[-1])) + 1
    return Pick(next((rank for rank in curve.ranks if rank >= needed), top), learning_rate, len(losses))


def search_with_tpe(curve: GridCurve, margin: float, budget: float, generator: np.random.Generator) -> Pick:
    import optuna

    return _search_with_optuna(
        curve, margin, budget, generator, optuna.pruners.MedianPruner(n_startup_trials=3), tpe=True
    )


def search_with_asha(curve: GridCurve, margin: float, budget: float, generator: np.random.Generator) -> Pick:
    import optuna

    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    return _search_with_optuna(curve, margin, budget, generator, pruner, tpe=False)


def _search_with_optuna(
    curve: GridCurve, margin: float, budget: float, generator: np.random.Generator, pruner: object, *, tpe: bool
) -> Pick:
    """Run Optuna over rank × learning rate with reports at the grid's checkpoints; a repeated cell costs nothing."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = int(generator.integers(2**31))
    sampler = (
        optuna.samplers.TPESampler(seed=seed, n_startup_trials=4) if tpe else optuna.samplers.RandomSampler(seed=seed)
    )
    study = optuna.create_study(sampler=sampler, pruner=pruner)  # type: ignore[arg-type]
    fractions = sorted(curve.checkpoints)
    losses: Losses = {}
    paid: dict[tuple[int, float], float] = {}
    for _ in range(20 * curve.size):
        if sum(paid.values()) >= budget:
            break
        trial = study.ask()
        rank = trial.suggest_categorical("rank", curve.ranks)
        learning_rate = trial.suggest_categorical("learning_rate", curve.learning_rates)
        final = get_first_loss(curve, rank, learning_rate)
        if final is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        pruned = False
        for number, fraction in enumerate(fractions, start=1):
            early = get_early_loss(curve, fraction, rank, learning_rate)
            if early is None:
                continue
            trial.report(early, number)
            paid[rank, learning_rate] = max(paid.get((rank, learning_rate), 0.0), fraction)
            if trial.should_prune():
                pruned = True
                break
        if pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        paid[rank, learning_rate] = 1.0
        losses[rank, learning_rate] = final
        study.tell(trial, final)
    return Pick(*find_smallest_within(losses, margin), sum(paid.values()))


DETERMINISTIC: dict[str, Baseline] = {
    "always 16, rate tuned": pick_rank_16,
    "argmin of one rate": pick_best_at_one_rate,
    "four points, default rate": pick_from_four_points,
    "Kneedle": pick_knee,
    "95% energy of the top": pick_by_energy,
}
STOCHASTIC: dict[str, Baseline] = {
    "random search": search_randomly,
    "Optuna TPE + median": search_with_tpe,
    "ASHA (Optuna)": search_with_asha,
}
