"""Rules for rows that look at no row: random samples that depend on nothing but their arguments, and which prompts are instructions."""

from __future__ import annotations

import numpy as np

MAX_DETECTION_ROWS = 256  # rows that are read to tell prompts that are questions from a few repeated instructions
MIN_ROWS_PER_INSTRUCTION = 16  # prompts that so many rows share on average are instructions
SAMPLE_STREAM = int.from_bytes(b"rightrank")


def sample_indices(population: int, count: int) -> list[int]:
    """Return `count` random numbers below `population` without replacement, or all of them if there are fewer.

    The sample depends only on the arguments, not on global generators. It uses its own random stream: with the stream that shuffled
    the rows, the sample would undo the shuffle.
    """
    generator = np.random.default_rng((SAMPLE_STREAM, 0))
    return list(map(int, generator.choice(population, min(count, population), replace=False)))


def are_instructions(num_prompts: int, num_rows: int) -> bool:
    """Return whether so few prompts of so many rows are repeated instructions, whose rows do not belong together."""
    min_prompts = max(2, min(num_rows, MAX_DETECTION_ROWS) // MIN_ROWS_PER_INSTRUCTION)
    return num_rows > 1 and num_prompts < min_prompts
