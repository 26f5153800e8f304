"""Intervals of means and of paired differences, by resampling items and seeds together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def resampled_means(sums: Floats, weights: Floats, resamples: int, generator: np.random.Generator) -> Floats:
    """Weighted means under two-way resampling.

    `sums` is [seeds, items]: each item's score summed over its tokens (or its own score); `weights` is
    [seeds, items] or [items]: its tokens (or ones). Seeds and items are each drawn with replacement, as two
    crossed random factors (Owen 2007, the pigeonhole bootstrap). Returns [resamples] values of
    Σ sums / Σ weights; with one seed only the items vary.
    """
    seeds, items = sums.shape
    weights = np.broadcast_to(weights, sums.shape)
    item_counts = generator.multinomial(items, np.full(items, 1 / items), size=resamples).astype(np.float64)
    seed_counts = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples).astype(np.float64)
    numerator = np.einsum("bs,bs->b", item_counts @ sums.T, seed_counts)
    denominator = np.einsum("bs,bs->b", item_counts @ weights.T, seed_counts)
    means: Floats = numerator / denominator
    return means
