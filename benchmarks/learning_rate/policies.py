"""The policies that the grids judge: what each hands over, from what it has seen on the validation split of one seed, and at which cost.

A policy sees validation losses alone. The test split gives the loss of what it hands over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TOP, SMALL = 64, 16
QUARTER = 0.25
ONE_SIDED_95 = 1.6449

Floats = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Key:
    """An adapter of a seed.

    Attributes:
        kind: `trained`, `truncated`, `average`, `average truncated`, `long` (twice the steps) or `long truncated`.
        fraction: how much of its training it has had.
        other: the second seed of an average.
    """

    kind: str
    rank: int
    rate: float
    fraction: float = 1.0
    other: int | None = None


@dataclass(frozen=True)
class Measured:
    """Losses of an adapter.

    Attributes:
        validation: [examples] summed losses; None where only the mean is stored.
        validation_mean: nats per label, infinite where the training diverged.
        test: [examples]; None where only the mean is stored.
        test_mean: not a number for adapters that are not final.
    """

    validation: Floats | None
    validation_mean: float
    test: Floats | None
    test_mean: float


@dataclass(frozen=True)
class SeedTable:
    """All adapters of one seed of a grid."""

    grid: str
    seed: int
    adapters: Mapping[Key, Measured]
    weights: Floats  # [validation examples]
    groups: Floats
    test_weights: Floats
    test_groups: Floats

    def rates(self, kind: str, rank: int, fraction: float = 1.0) -> list[float]:
        return sorted(
            key.rate
            for key in self.adapters
            if (key.kind, key.rank, key.fraction, key.other) == (kind, rank, fraction, None)
        )

    def trained(self) -> dict[tuple[int, float], Measured]:
        """Return the finished trainings by rank and learning rate."""
        return {
            (key.rank, key.rate): measured
            for key, measured in self.adapters.items()
            if key.kind == "trained" and key.fraction == 1
        }

    def find_cuts(self, kind: str, rate: float, other: int | None = None) -> dict[int, Key]:
        """Return the truncations of an adapter by rank."""
        return {
            key.rank: key
            for key in self.adapters
            if key.kind == f"{kind} truncated".removeprefix("trained ") and key.rate == rate and key.other == other
        }


@dataclass(frozen=True)
class Choice:
    """What a policy hands over.

    Attributes:
        whole: the adapter that was truncated to `key`; None without a truncation.
        trainings: the cost in whole trainings of the grid's steps.
        recipe: rank and learning rate to train again with.
    """

    key: Key
    trainings: float
    recipe: tuple[int, float]
    whole: Key | None = None


Policy = Callable[[SeedTable, float], Choice | None]


def compute_bound(differences: Floats, weights: Floats, groups: Floats) -> tuple[float, float, float]:
    """Return mean, standard error and upper one-sided 95% bound of a paired difference per label; groups are drawn, not their rows."""
    mean = float(differences.sum() / weights.sum())
    _, numbers = np.unique(groups, return_inverse=True)
    residuals = np.bincount(numbers, differences - mean * weights)
    count = len(residuals)
    error = math.sqrt(float((residuals**2).sum()) * count / max(1, count - 1)) / float(weights.sum())
    quantile = ONE_SIDED_95 + (ONE_SIDED_95**3 + ONE_SIDED_95) / (4 * max(1, count - 1))  # Student's t, to first order
    return mean, error, mean + quantile * error


def compare(table: SeedTable, first: Key, second: Key) -> tuple[float, float, float]:
    """Return mean, standard error and upper bound of first minus second on the validation split."""
    a, b = table.adapters[first], table.adapters[second]
    difference = a.validation_mean - b.validation_mean
    if a.validation is None or b.validation is None or not math.isfinite(difference):
        return difference, 0.0, difference
    return compute_bound(a.validation - b.validation, table.weights, table.groups)


def choose_learning_rate(table: SeedTable, rank: int, fraction: float = QUARTER) -> float | None:
    """Return the learning rate with the lowest validation loss at a part of the training, or the next lower one within one standard error of it."""
    rates = table.rates("trained", rank, fraction)
    finite = [
        rate for rate in rates if math.isfinite(table.adapters[Key("trained", rank, rate, fraction)].validation_mean)
    ]
    if not finite:
        return None
    keys = {rate: Key("trained", rank, rate, fraction) for rate in finite}
    best = min(finite, key=lambda rate: table.adapters[keys[rate]].validation_mean)
    lower = [rate for rate in finite if rate < best]
    if lower:
        mean, error, _ = compare(table, keys[lower[-1]], keys[best])
        if mean <= error:
            return lower[-1]
    return best


def truncate_within(table: SeedTable, whole: Key, margin: float) -> Key:
    """Return the smallest truncation within the margin: from the top downward, until an upper bound exceeds it."""
    chosen = whole
    cuts = table.find_cuts(whole.kind, whole.rate, whole.other)
    for rank in sorted(cuts, reverse=True):
        if compare(table, cuts[rank], whole)[2] > margin:
            break
        chosen = cuts[rank]
    return chosen


def cost_of_search(table: SeedTable, rank: int, fraction: float = QUARTER) -> float:
    """Return the trainings of a search that stops all learning rates but one at a part of the training."""
    return 1 + fraction * (len(table.rates("trained", rank, fraction)) - 1)


def hand_over(table: SeedTable, whole: Key, margin: float, trainings: float) -> Choice:
    """Truncate an adapter and make it the choice."""
    return Choice(truncate_within(table, whole, margin), trainings, (min(whole.rank, TOP), whole.rate), whole)


def is_usable(table: SeedTable, key: Key) -> bool:
    return key in table.adapters and math.isfinite(table.adapters[key].validation_mean)


def search_adapter(table: SeedTable, margin: float) -> Choice | None:
    """`--goal adapter`: every learning rate at rank 64 to a quarter, the chosen one to the end, truncated within the margin."""
    rate = choose_learning_rate(table, TOP)
    if rate is None or not is_usable(table, Key("trained", TOP, rate)):
        return None
    return hand_over(table, Key("trained", TOP, rate), margin, cost_of_search(table, TOP))


def search_best_adapter(table: SeedTable, margin: float) -> Choice | None:
    """`--goal best-adapter`: ranks 64 and 16, each with its own search; the better one on the validation split, truncated if it is the larger."""
    searches = [(rank, choose_learning_rate(table, rank)) for rank in (TOP, SMALL)]
    keys = [
        Key("trained", rank, rate)
        for rank, rate in searches
        if rate is not None and is_usable(table, Key("trained", rank, rate))
    ]
    if not keys:
        return None
    best = min(keys, key=lambda key: table.adapters[key].validation_mean)
    trainings = cost_of_search(table, TOP) + cost_of_search(table, SMALL)
    return (
        hand_over(table, best, margin, trainings) if best.rank == TOP else Choice(best, trainings, (SMALL, best.rate))
    )


def tune(rank: int, is_truncated: bool = False) -> Policy:
    """Return the policy of a fixed rank whose learning rate is tuned by whole trainings."""

    def policy(table: SeedTable, margin: float) -> Choice | None:
        keys = [key for rate in table.rates("trained", rank) if is_usable(table, key := Key("trained", rank, rate))]
        if not keys:
            return None
        best = min(keys, key=lambda key: table.adapters[key].validation_mean)
        trainings = float(len(table.rates("trained", rank)))
        return hand_over(table, best, margin, trainings) if is_truncated else Choice(best, trainings, (rank, best.rate))

    return policy


PRIMARY: dict[str, Policy] = {
    "adapter": search_adapter,
    "best-adapter": search_best_adapter,
    "16, rate tuned by whole trainings": tune(SMALL),
}


def resample_grids(values: Mapping[str, Sequence[float]]) -> dict[str, float | int]:
    """Return the mean over grids of each grid's mean, with a 95% interval that resamples grids."""
    means = np.array([np.mean(values[name]) for name in sorted(values)])
    picks = np.random.default_rng(0).integers(len(means), size=(10_000, len(means)))
    low, high = np.quantile(means[picks].mean(1), (0.025, 0.975))
    return {
        "mean": round(float(means.mean()), 5),
        "low": round(float(low), 5),
        "high": round(float(high), 5),
        "grids": len(means),
    }
