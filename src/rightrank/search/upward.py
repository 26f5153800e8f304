"""The `upward` strategy: trains from the smallest rank upward, without early stopping, and measures the seed noise first.

It is meant for reinforcement learning.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import numpy as np

from rightrank.decision.seeds import compute_detectable_difference, compute_needed_seeds
from rightrank.schema.trials import Arm
from rightrank.search.history import Requests, Space, Trials, orient_value
from rightrank.search.protocol import CostEstimate, Strategy

NOISE_SEEDS = 3  # seeds of the smallest rank that measure the noise before any other rank is trained
NEIGHBOUR_COUNT = 1  # learning rates to try on either side of the previous rank's best one


class Upward(Strategy):
    """Trains all learning rates at the smallest rank, measures the seed noise there, and then trains higher ranks until one gains too little.

    In reinforcement learning the values of the first fifth of a run say little about its end. So every training is complete: no learning
    rate is dropped or selected for its early values.
    """

    name = "upward"

    def script(self, trials: Trials) -> Requests:
        start, *higher = self.space.ranks
        yield [self.space.make_arm(start, learning_rate) for learning_rate in self.space.learning_rates]
        learning_rate = yield from self._train_seeds(trials, start, self.space.seeds[:NOISE_SEEDS])
        seeds = self._select_seeds(trials, start, learning_rate)
        best_so_far = yield from self._train_seeds(trials, start, seeds)
        for rank in higher:
            yield [self.space.make_arm(rank, neighbour_rate) for neighbour_rate in self._select_neighbours(best_so_far)]
            best = yield from self._train_seeds(trials, rank, seeds)
            best_so_far = best_so_far if best is None else best
            lower_ranks = [lower_rank for lower_rank in trials.list_ranks() if lower_rank < rank]
            if best is not None and lower_ranks and not self.has_gain(trials, rank, lower_ranks):
                return

    def estimate_unbounded_cost(self) -> CostEstimate:
        seeds, learning_rates = len(self.space.seeds), len(self.space.learning_rates)
        expected = learning_rates + min(1 + 2 * NEIGHBOUR_COUNT, learning_rates) + 2.0 * (seeds - 1)
        maximum = float(self._count_cells())
        expected = min(expected, maximum)
        return CostEstimate(expected, maximum, expected, learning_rates + 1.0, 1 + self._count_cells())

    def _train_seeds(
        self, trials: Trials, rank: int, seeds: Sequence[int]
    ) -> Generator[Sequence[Arm], None, float | None]:
        """Train the seeds at the best learning rate until it stays the best; return it, or None without a result."""
        while True:
            best = trials.find_best_learning_rate(rank)
            if best is None:
                return None
            missing = [arm for seed in seeds if (arm := self.space.make_arm(rank, best, seed)) not in trials.outcomes]
            if not missing:
                return best
            yield missing

    def _select_seeds(self, trials: Trials, rank: int, learning_rate: float | None) -> Sequence[int]:
        """Return as many seeds as the measured noise requires, at most those of the space. A note states the numbers."""
        space, values = self.space, []
        if learning_rate is not None:
            values = [orient_value(trial, space) for trial in trials.get_trials_by_seed(rank, learning_rate).values()]
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        if deviation == 0:
            outcome = "with the same result" if len(values) > 1 else "with a result"
            trials.notes.append(
                f"Seed noise: not measured at rank {rank} ({len(values)} seed{'s' * (len(values) != 1)} {outcome}); "
                "give seeds=(0, 1, 2) or more to measure it."
            )
            return space.seeds
        margin = trials.margin
        needed = max(2, compute_needed_seeds(deviation, margin))
        trials.notes.append(_format_noise_note(space, rank, len(values), deviation, margin, needed))
        return space.seeds[:needed]

    def _select_neighbours(self, learning_rate: float | None) -> Sequence[float]:
        """Return the learning rate and its neighbours; all learning rates if it is None."""
        rates = self.space.learning_rates
        if learning_rate is None:
            return rates
        index = rates.index(learning_rate)
        return rates[max(0, index - NEIGHBOUR_COUNT) : index + NEIGHBOUR_COUNT + 1]

    def has_gain(self, trials: Trials, rank: int, lower: Sequence[int]) -> bool:
        """Return whether the mean of the rank is better than the best of the lower ranks by more than the margin."""
        best = min((trials.compute_best_loss(lower_rank) for lower_rank in lower), default=math.inf)
        return best - trials.compute_best_loss(rank) > trials.margin


def _format_noise_note(space: Space, rank: int, num_measured: int, deviation: float, margin: float, needed: int) -> str:
    opening = (
        f"Seed noise at rank {rank}: a standard deviation of {deviation:.2g} over {num_measured} seeds. Detecting a difference of "
        f"{margin:.2g} between two ranks takes about {needed} seed{'s' * (needed != 1)} per rank"
    )
    num_seeds = len(space.seeds)
    if needed <= num_seeds:
        return f"{opening}; {needed} of the {num_seeds} are used."
    return f"{opening}; the {num_seeds} given seeds detect differences from about {compute_detectable_difference(deviation, num_seeds):.2g}."
