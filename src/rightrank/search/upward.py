"""The `upward` strategy: trains from the smallest rank upward, without early stopping, and measures the seed noise first.

It is meant for reinforcement learning.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import numpy as np

from rightrank.decision.seeds import compute_detectable_difference, compute_needed_seeds
from rightrank.schema.trials import Arm
from rightrank.search.learning_rates import list_neighbours
from rightrank.search.protocol import CostEstimate, Requests, Strategy, Trials, orient_value

NOISE_SEEDS = 3  # seeds of the smallest rank that measure the noise before any other rank is trained


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
            rates = self.space.learning_rates if best_so_far is None else list_neighbours(self.space, best_so_far)
            yield [self.space.make_arm(rank, rate) for rate in rates]
            best = yield from self._train_seeds(trials, rank, seeds)
            best_so_far = best_so_far if best is None else best
            lower_ranks = [lower_rank for lower_rank in trials.list_ranks() if lower_rank < rank]
            if best is not None and lower_ranks and not self.has_gain(trials, rank, lower_ranks):
                return

    def estimate_unbounded_cost(self) -> CostEstimate:
        seeds, learning_rates = len(self.space.seeds), len(self.space.learning_rates)
        expected = learning_rates + min(3, learning_rates) + 2.0 * (seeds - 1)
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
        seeds = self.space.seeds
        trainings = {} if learning_rate is None else trials.get_trials_by_seed(rank, learning_rate)
        values = {orient_value(training, self.space) for training in trainings.values()}
        if len(values) < 2:
            trials.notes.append(
                f"Seed noise: not measured, for rank {rank} has fewer than two different results; give seeds=(0, 1, 2) or more to measure it."
            )
            return seeds
        deviation = float(np.std([orient_value(training, self.space) for training in trainings.values()], ddof=1))
        needed = max(2, compute_needed_seeds(deviation, trials.margin))
        detectable = compute_detectable_difference(deviation, len(seeds[:needed]))
        trials.notes.append(
            f"Seed noise at rank {rank}: a standard deviation of {deviation:.2g} over {len(trainings)} seeds. Detecting a difference of "
            f"{trials.margin:.2g} between two ranks takes about {needed} seeds per rank; {len(seeds[:needed])} of the {len(seeds)} are used, "
            f"which detect differences from about {detectable:.2g}."
        )
        return seeds[:needed]

    def has_gain(self, trials: Trials, rank: int, lower: Sequence[int]) -> bool:
        """Return whether the mean of the rank is better than the best of the lower ranks by more than the margin."""
        best = min((trials.compute_best_loss(lower_rank) for lower_rank in lower), default=math.inf)
        return best - trials.compute_best_loss(rank) > trials.margin
