"""Random samples that depend on nothing but their arguments."""

from __future__ import annotations

import numpy as np

SAMPLE_STREAM = int.from_bytes(b"rightrank")


def sample_indices(population: int, count: int) -> list[int]:
    """Return `count` random numbers below `population` without replacement, or all of them if there are fewer.

    The sample depends only on the arguments, not on global generators. It uses its own random stream: with the stream that shuffled
    the rows, the sample would undo the shuffle.
    """
    generator = np.random.default_rng((SAMPLE_STREAM, 0))
    return list(map(int, generator.choice(population, min(count, population), replace=False)))
