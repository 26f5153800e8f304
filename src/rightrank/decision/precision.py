"""Before any training: how precisely a selection can compare ranks, from the base's losses and the noise of stored runs.

The noise of a paired difference is its spread between examples, over the root of their number, and its noise over seeds.
Both are expected from stored runs (`benchmarks/preflight`): the spread of a language model's difference is a share of the
spread of the base's own example losses, and that of classes and of scores from 0 to 1 is a constant. The noise over seeds is
a share of the spread. The prediction is for the widest of the ranks below the top: narrower ones are settled sooner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from rightrank.decision.comparison import CONFIDENCE, examples_needed, is_within
from rightrank.decision.intervals import Estimate
from rightrank.decision.seeds import SHARED_REFERENCE, WITHIN_DEGREES, start_of

NoiseKind: TypeAlias = Literal["tokens", "classes", "scores"]

MAX_SEEDS = 20


@dataclass(frozen=True, slots=True)
class StoredNoise:
    """What stored runs say of the widest difference between ranks."""

    spread: float  # between examples: a share of the base's spread ("tokens"), else in the metric's unit
    seed_ratio: float  # the variance over seeds of one seed's difference, over the squared spread, of long trainings
    # the same of trainings of fewer than `LONG_STEPS` steps, which vary far more from seed to seed
    short_seed_ratio: float


# Fitted and judged by `python -m benchmarks.preflight.calibrate`; a test compares these with its stored result.
STORED: dict[NoiseKind, StoredNoise] = {
    "tokens": StoredNoise(spread=0.1, seed_ratio=0.0035, short_seed_ratio=0.019),
    "classes": StoredNoise(spread=0.43, seed_ratio=0.0035, short_seed_ratio=0.019),
    "scores": StoredNoise(spread=0.41, seed_ratio=0.0005, short_seed_ratio=0.006),
}
LONG_STEPS = 200
PAIRS = 3  # of ranks with the reference: four ranks


@dataclass(frozen=True, slots=True)
class Precision:
    """The expected precision of a comparison of ranks, in the metric's unit."""

    noise: StoredNoise
    spread: float  # between examples, of one example's difference
    examples: int
    seeds: int
    steps: int  # of a training

    @property
    def half_width(self) -> float:
        """The one-sided 95% half-width of the widest rank's difference from the top."""
        return self._at(self.seeds).bound(CONFIDENCE)

    @property
    def undecided_below_margin(self) -> float:
        """Below this margin, not even a rank that equals the top is expected to be shown to be enough."""
        return self.half_width

    def _at(self, seeds: int) -> Estimate:
        of_examples = self.spread**2 / self.examples
        if seeds == 1:  # nothing is measured over seeds: the bound is over examples alone
            return Estimate(0.0, of_examples, 0.0, 0.0, self.examples, 1, 0.0, 0.0)
        ratio = self.noise.seed_ratio if self.steps >= LONG_STEPS else self.noise.short_seed_ratio
        of_seeds = ratio * self.spread**2 / seeds
        known = start_of("token_loss").degrees + SHARED_REFERENCE * PAIRS * (seeds - 1)
        degrees = 1 / (1 / WITHIN_DEGREES + 1 / known) + seeds - 1  # as `decision.seeds` moderates
        return Estimate(0.0, of_examples, of_seeds, 0.0, self.examples, seeds, degrees, 0.0)

    def examples_needed(self, margin: float) -> int | None:
        """The validation examples with which the half-width is within `margin`, about; None: no number of them suffices."""
        return examples_needed(self._at(self.seeds), margin, power=0.5)

    def seeds_needed(self, margin: float) -> int | None:
        """The seeds with which the half-width is within `margin`; None: more than `MAX_SEEDS`, or one shows as much."""
        wanted = range(max(2, self.seeds + 1), MAX_SEEDS + 1)
        return next((n for n in wanted if is_within(self._at(n).bound(CONFIDENCE), margin)), None)


def base_spread(losses: Sequence[float], tokens: Sequence[int]) -> float:
    """The standard deviation between examples of the base's influence on its mean loss.

    Args:
        losses: [examples] nats, summed over the label tokens of each.
        tokens: [examples] label tokens of each.
    """
    sums, weights = np.asarray(losses, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    influence = (sums - weights * (sums.sum() / weights.sum())) / weights.mean()
    return float(influence.std())


def expected_precision(
    kind: NoiseKind,
    spread_of_base: float,
    examples: int,
    seeds: int,
    steps: int,
    stored: StoredNoise | None = None,
) -> Precision:
    """The precision to expect of `examples` validation examples and `seeds` seeds of each rank, each trained for `steps` steps.

    Args:
        stored: in place of `STORED[kind]`.
    """
    noise = stored or STORED[kind]
    spread = noise.spread * spread_of_base if kind == "tokens" else noise.spread
    return Precision(noise, spread, examples, seeds, steps)


def rounded_up(margin: float) -> float:
    """`margin` rounded up to two digits, so that the number shown is not below it."""
    if margin <= 0:
        return margin
    unit = 10.0 ** (math.floor(math.log10(margin)) - 1)
    return round(math.ceil(margin / unit - 1e-9) * unit, 12)
